"""PSNR, SSIM, relative L2 and cosine of pictures and latents."""

import math

import numpy as np
import pytest
import torch

from tessera.quantization import similarity


def drawn(height, width, channels, shift=0.0):
    y, x, k = np.meshgrid(np.arange(height), np.arange(width), np.arange(channels), indexing="ij")
    return 0.5 + 0.4 * np.sin(0.3 * x + 0.2 * y + k + shift) * np.cos(0.05 * x * y / (1 + k))


def noisy():
    ripple = np.sin(1.7 * np.arange(48)[:, None, None] + 0.9 * np.arange(64)[None, :, None])
    return np.clip(drawn(48, 64, 3) + 0.1 * ripple, 0, 1)


CASES = {
    "noisy": (drawn(48, 64, 3), noisy(), 0.9071502231082115, 23.010307568091267),
    "shifted": (drawn(48, 64, 3), drawn(48, 64, 3, 0.5), 0.8419796294128762, 19.92174305210762),
    "small": (drawn(16, 13, 1), drawn(16, 13, 1, 0.2), 0.970969372524055, 27.98685220380232),
}


def tensors(case):
    a, b, *expected = CASES[case]
    return torch.from_numpy(a)[None], torch.from_numpy(b)[None], *expected


@pytest.mark.parametrize("case", CASES)
def test_ssim_and_psnr_are_those_of_scikit_image(case):
    """The numbers are scikit-image 0.26.0's, of the very pictures above in fp64:

    structural_similarity(a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0,
    channel_axis=-1), which its documentation gives as Wang et al.'s setting, and peak_signal_noise_ratio(a, b,
    data_range=1.0).
    """
    a, b, ssim, psnr = tensors(case)
    found, _ = similarity.of_pictures(a, b)
    assert abs(found.ssim - ssim) < 1e-9 and abs(found.psnr - psnr) < 1e-9


def test_relative_l2_and_cosine_are_those_of_the_definition():
    a, b, *_ = tensors("noisy")
    found, _ = similarity.of_pictures(a, b)
    x, y = a.flatten(), b.flatten()
    assert found.relative_l2 == pytest.approx(((y - x).norm() / x.norm()).item(), rel=1e-12)
    assert found.cosine == pytest.approx((x @ y / x.norm() / y.norm()).item(), rel=1e-12)


def test_relative_l2_is_of_the_first():
    a, b, *_ = tensors("noisy")
    assert similarity.of_pictures(b, a)[0].relative_l2 != similarity.of_pictures(a, b)[0].relative_l2
    assert similarity.of_pictures(a, 2 * a)[0].relative_l2 == pytest.approx(1)


def test_a_picture_is_identical_to_itself():
    a, *_ = tensors("noisy")
    found, _ = similarity.of_pictures(a, a.clone())
    assert found.identical and found.words() == ("identical", "1.0000", "0 %", "1.000000")


def test_sums_of_a_large_picture_are_exact():
    a = torch.full((1, 512, 512, 3), 0.5)
    b = a + 2**-12  # fp32 sums of 786,432 such squares are off
    found, _ = similarity.of_pictures(a, b)
    assert found.psnr == pytest.approx(20 * math.log10(2**12), rel=1e-12)
    assert found.relative_l2 == pytest.approx(2**-11, rel=1e-12)


def test_a_batch_is_compared_pair_by_pair_and_as_one():
    a, b, *_ = tensors("noisy")
    _, c, *_ = tensors("shifted")
    whole, each = similarity.of_pictures(torch.cat([a, a]), torch.cat([b, c]))
    alone = [similarity.of_pictures(a, other)[0] for other in (b, c)]
    assert each == alone
    assert whole.ssim == pytest.approx(sum(one.ssim for one in alone) / 2)
    error = sum(10 ** (-one.psnr / 10) for one in alone) / 2
    assert whole.psnr == pytest.approx(-10 * math.log10(error))


def test_one_reference_meets_every_picture():
    a, b, *_ = tensors("noisy")
    _, each = similarity.of_pictures(a, torch.cat([b, a]))
    assert not each[0].identical and each[1].identical


def test_numbers_of_latents_do_not_depend_on_their_scale():
    torch.manual_seed(0)
    a = torch.randn(2, 16, 24, 24)
    b = a + 0.1 * torch.randn(2, 16, 24, 24)
    found, scaled = (similarity.of_latents(a * by, b * by)[0] for by in (1, 8))
    assert (found.psnr, found.ssim, found.relative_l2) == pytest.approx(
        (scaled.psnr, scaled.ssim, scaled.relative_l2), rel=1e-9
    )
    assert 0.095 < found.relative_l2 < 0.105 and 0.97 < found.ssim < 1


def test_latents_of_a_video_are_compared():
    a = torch.randn(1, 4, 3, 16, 16)
    assert similarity.of_latents(a, a)[0].identical


def test_a_picture_smaller_than_a_window_has_no_ssim():
    found, _ = similarity.of_pictures(torch.zeros(1, 8, 64, 3), torch.ones(1, 8, 64, 3))
    assert math.isnan(found.ssim) and found.words()[1] == "too small" and found.psnr == 0


def test_other_sizes_are_refused_naming_both():
    with pytest.raises(ValueError, match="original is 64 x 48, 3 channels, quantized is 32 x 48, 3 channels: only"):
        similarity.of_pictures(torch.zeros(1, 48, 64, 3), torch.zeros(1, 48, 32, 3), ("original", "quantized"))
    with pytest.raises(ValueError, match=r"a is \[16, 16, 16\], b is \[4, 16, 16\]"):
        similarity.of_latents(torch.zeros(1, 16, 16, 16), torch.zeros(1, 4, 16, 16))
    with pytest.raises(ValueError, match="a has 2 pictures, b has 3"):
        similarity.of_pictures(torch.zeros(2, 16, 16, 3), torch.zeros(3, 16, 16, 3))


def test_what_is_no_number_is_refused():
    a = torch.zeros(1, 16, 16, 3)
    with pytest.raises(ValueError, match="b: holds NaN or infinity"):
        similarity.of_pictures(a, a / 0)
