"""Z-Image's NextDiT in plain batched PyTorch, with the host's parameter names, layout and output sign.

Own code because the host's class needs ComfyUI and takes one caption length per batch. Dimensions follow the host:
the FFN is 8/3 dim rounded up to 256, adaLN reads 256 numbers, captions and picture tokens are padded to 32.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

PAD = 32
ADALN = 256


@dataclass(frozen=True)
class Config:
    dim: int = 256
    heads: int = 4
    layers: int = 3
    refiners: int = 2
    text_dim: int = 64
    channels: int = 16
    patch: int = 2
    axes: tuple = (16, 24, 24)
    theta: float = 256.0

    @property
    def ffn(self):
        return -(-int(self.dim * 8 / 3) // 256) * 256


def rope_table(positions, cfg):
    """Cosine and sine of every rotation, each repeated for its pair: [N, 3] -> 2 x [1, N, 1, head]."""
    angles = [
        positions[:, a, None].double() / cfg.theta ** (torch.arange(0, d, 2, dtype=torch.float64) / d)
        for a, d in enumerate(cfg.axes)
    ]
    angles = torch.cat(angles, 1).repeat_interleave(2, 1)[None, :, None]
    return angles.cos().float(), angles.sin().float()


def rotate(x, table, turn):
    """RoPE on neighbouring pairs: [B, N, heads, head]; `turn` maps each pair (a, b) to (-b, a) (as a GEMM: strided
    pairs do not vectorise in a compiled graph)."""
    cos, sin = table
    return x * cos + (x @ turn) * sin


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg.heads
        self.qkv = nn.Linear(cfg.dim, 3 * cfg.dim, bias=False)
        self.out = nn.Linear(cfg.dim, cfg.dim, bias=False)
        self.q_norm = nn.RMSNorm(cfg.dim // cfg.heads, eps=torch.finfo(torch.float32).eps)
        self.k_norm = nn.RMSNorm(cfg.dim // cfg.heads, eps=torch.finfo(torch.float32).eps)
        turn = torch.block_diag(*[torch.tensor([[0.0, 1.0], [-1.0, 0.0]])] * (cfg.dim // cfg.heads // 2))
        self.register_buffer("turn", turn, persistent=False)

    def forward(self, x, table):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = (rotate(n(a), table, self.turn.to(a.dtype)).to(v.dtype) for n, a in ((self.q_norm, q), (self.k_norm, k)))
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))
        # written out: at 96 tokens forward + backward take 6 ms, fused attention 28 (CPU, one thread)
        share = (q @ k.transpose(-1, -2)).float().mul(q.shape[-1] ** -0.5).softmax(-1).to(v.dtype)
        return self.out((share @ v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.w1 = nn.Linear(cfg.dim, cfg.ffn, bias=False)
        self.w2 = nn.Linear(cfg.ffn, cfg.dim, bias=False)
        self.w3 = nn.Linear(cfg.dim, cfg.ffn, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, cfg, modulation=True):
        super().__init__()
        self.attention = Attention(cfg)
        self.feed_forward = FeedForward(cfg)
        for name in ("attention_norm1", "ffn_norm1", "attention_norm2", "ffn_norm2"):
            setattr(self, name, nn.RMSNorm(cfg.dim, eps=1e-5))
        if modulation:
            self.adaLN_modulation = nn.Sequential(nn.Linear(ADALN, 4 * cfg.dim))

    def forward(self, x, table, t=None):
        if t is None:
            x = x + self.attention_norm2(self.attention(self.attention_norm1(x), table))
            return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
        scale_a, gate_a, scale_f, gate_f = self.adaLN_modulation(t).unsqueeze(1).chunk(4, -1)
        x = x + gate_a.tanh() * self.attention_norm2(self.attention(self.attention_norm1(x) * (1 + scale_a), table))
        return x + gate_f.tanh() * self.ffn_norm2(self.feed_forward(self.ffn_norm1(x) * (1 + scale_f)))


class TimeEmbedder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, min(cfg.dim, 1024)), nn.SiLU(), nn.Linear(min(cfg.dim, 1024), ADALN))

    def forward(self, t):
        a = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        return self.mlp(torch.cat((a.cos(), a.sin()), -1).to(self.mlp[0].weight.dtype))


class FinalLayer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.linear = nn.Linear(cfg.dim, cfg.patch**2 * cfg.channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(ADALN, cfg.dim))

    def forward(self, x, t):
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        return self.linear(x * (1 + self.adaLN_modulation(t).unsqueeze(1)))


class TinyZImage(nn.Module):
    """The velocity noise - latent at a noise level sigma, given a caption."""

    def __init__(self, cfg=None):
        super().__init__()
        self.cfg = cfg = cfg or Config()
        self.x_embedder = nn.Linear(cfg.patch**2 * cfg.channels, cfg.dim)
        self.cap_embedder = nn.Sequential(nn.RMSNorm(cfg.text_dim, eps=1e-5), nn.Linear(cfg.text_dim, cfg.dim))
        self.t_embedder = TimeEmbedder(cfg)
        self.noise_refiner = nn.ModuleList(Block(cfg) for _ in range(cfg.refiners))
        self.context_refiner = nn.ModuleList(Block(cfg, modulation=False) for _ in range(cfg.refiners))
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.final_layer = FinalLayer(cfg)
        self.x_pad_token = nn.Parameter(torch.zeros(1, cfg.dim))
        self.cap_pad_token = nn.Parameter(torch.randn(1, cfg.dim) * 0.02)
        self._tables = {}
        self.reset()

    def reset(self):
        """Normal weights of variance 1/in, a silent output layer, gates that start at tanh(0.3)."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=m.in_features**-0.5)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        for block in (*self.noise_refiner, *self.layers):
            nn.init.zeros_(block.adaLN_modulation[0].weight)
            with torch.no_grad():
                block.adaLN_modulation[0].bias.view(4, -1)[1::2] = 0.3
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.adaLN_modulation[1].weight)

    def tables(self, captions, rows, columns):
        """RoPE tables of the caption, at 1, 2, ..., and of the picture, at (captions + 1, row, column)."""
        key = captions, rows, columns
        if key not in self._tables:
            text = torch.zeros(captions, 3)
            text[:, 0] = torch.arange(captions) + 1
            image = torch.cartesian_prod(torch.tensor([captions + 1]), torch.arange(rows), torch.arange(columns))
            image = F.pad(image.float(), (0, 0, 0, -len(image) % PAD))
            self._tables[key] = rope_table(text, self.cfg), rope_table(image, self.cfg)
        return self._tables[key]

    def forward(self, x, sigma, words, lengths=None):
        """Latents [B, C, H, W], sigma [B], word vectors [B, L, text_dim], caption lengths [B] (all L if absent)."""
        b, c, h, w = x.shape
        p = self.cfg.patch
        text = F.pad(self.cap_embedder(words), (0, 0, 0, -words.shape[1] % PAD))
        lengths = torch.full((b,), words.shape[1], device=x.device) if lengths is None else lengths
        empty = torch.arange(text.shape[1], device=x.device) >= lengths[:, None]
        text = torch.where(empty.unsqueeze(-1), self.cap_pad_token.to(text.dtype), text)
        text_table, image_table = self.tables(text.shape[1], h // p, w // p)

        x = x.view(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        x = self.x_embedder(x)
        n = x.shape[1]
        x = torch.cat((x, self.x_pad_token.to(x.dtype).expand(b, -n % PAD, -1)), 1)
        t = self.t_embedder((1 - sigma) * 1000)
        for block in self.context_refiner:
            text = block(text, text_table)
        for block in self.noise_refiner:
            x = block(x, image_table, t)
        x = torch.cat((text, x), 1)
        table = tuple(torch.cat(pair, 1) for pair in zip(text_table, image_table, strict=True))
        for block in self.layers:
            x = block(x, table, t)
        x = self.final_layer(x, t)[:, text.shape[1] : text.shape[1] + n]
        x = x.view(b, h // p, w // p, p, p, c).permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
        return -x
