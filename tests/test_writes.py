"""Whatever happens while a file is written: the old one is there, or the new one, whole; and of a pair both or none."""

import contextlib
import errno
import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import extracting
import killed
import powercut
import test_baking
from conftest import TESTS
from failing import Disk
from synthetic import fingerprint
from tessera import calibration_file, journal, output, planning, publication, repairing, transcode
from tessera.checkpoint import Checkpoint
from tessera.extraction import Extraction
from tessera.formats import TensorSpec
from tessera.formats.fp8 import FP8Row
from tessera.quantization.difference import Wish
from tessera.writer import Writer

MODEL, LORA = powercut.MODEL, powercut.LORA
KILLS = 24


@pytest.fixture
def folder(tmp_path):
    powercut.source(tmp_path)
    return tmp_path


@pytest.fixture
def old(folder):
    """The folder with the pair of another job, and its fingerprint."""
    powercut.run(folder, seed=1)
    return folder, fingerprint(folder)


@pytest.fixture(scope="module")
def new(tmp_path_factory):
    """The files that an undisturbed job makes."""
    folder = tmp_path_factory.mktemp("new")
    powercut.source(folder)
    powercut.run(folder)
    return fingerprint(folder / "out")


def write(path, value=1.0, **options):
    """A small file of one tensor."""
    with Writer(path, {"x": TensorSpec(torch.float32, (100,))}, 200, **options) as writer:
        writer.write("x", torch.full((100,), value))
        writer.finish({"made": "here"})
        writer.publish()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- kills and power cuts


def test_no_kill_and_no_power_cut_leaves_anything_but_whole_pairs_or_what_the_next_start_makes_whole(tmp_path):
    command = [sys.executable, str(TESTS / "powercut.py"), str(tmp_path), str(KILLS), "20"]
    found = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert found.returncode == 0, found.stderr
    said = json.loads(found.stdout)
    assert said["problems"] == [] and said["points"] == KILLS and sum(said["found"].values()) == KILLS


@pytest.mark.parametrize("resume", [False, True])
def test_a_pair_that_was_half_published_is_finished_by_the_next_job_there(old, new, resume):
    """Whichever job that is, and whether it may overwrite or not."""
    folder, _ = old
    with pytest.MonkeyPatch.context() as patch:
        half_published(folder, patch)
    pair = [folder / "out" / name for name in (MODEL, LORA)]
    assert "is the correction of another model.safetensors" in output.pair_problem(*pair)
    with pytest.raises(ValueError, match="already exists"):
        powercut.run(folder, seed=2, resume=resume)
    assert fingerprint(folder / "out") == new
    assert output.pair_problem(*(folder / "out" / name for name in (MODEL, LORA))) is None


def half_published(folder, patch):
    """The process is gone when the LoRA has its name and the model has not."""
    rename = publication._rename

    def once(*arguments):
        rename(*arguments)
        raise Gone

    patch.setattr(publication, "_rename", once)
    patch.setattr(publication, "_take_back", lambda *_: None)
    patch.setattr(journal.Journal, "__exit__", lambda self, *_: self._file.close())
    patch.setattr(Writer, "__exit__", lambda self, *_: self._file.close())
    with pytest.raises(Gone):
        powercut.run(folder, overwrite=True)


class Gone(BaseException):
    pass


def test_a_file_that_came_meanwhile_is_not_replaced_by_finishing_another_job(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(powercut.job.Job, "overwrite", False)
        half_published_new(folder, patch)
    (folder / "out" / MODEL).write_bytes(b"somebody else's")
    journal.settle(folder / "out" / MODEL)
    assert (folder / "out" / MODEL).read_bytes() == b"somebody else's"
    assert names(folder / "out") == [MODEL, LORA]


def half_published_new(folder, patch):
    run = powercut.run
    patch.setattr(powercut, "run", lambda folder, **_: run(folder))
    half_published(folder, patch)


# ---- disks that are full, fail, or cannot be written


def test_whichever_call_the_disk_refuses_the_old_pair_stays_and_nothing_else(old, new):
    """Disk full, quota reached, a failing disk, one that turns read-only: at every call that writes."""
    folder, before = old
    with Disk()() as disk:
        powercut.run(folder, overwrite=True)
    assert fingerprint(folder / "out") == new and {"write", "fsync", "replace", "truncate"} <= set(disk.calls)
    powercut.run(folder, seed=1, overwrite=True)
    assert fingerprint(folder) == before
    for number in range(1, len(disk.calls) + 1):
        error = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)[number % 4]
        with Disk(number, error)() as failing:
            try:
                powercut.run(folder, overwrite=True)
                outcome = None
            except (ValueError, RuntimeError) as problem:
                outcome = str(problem)
        where = f"{failing.calls[-1]}, call {number} of {len(disk.calls)}: {os.strerror(error)}: {outcome}"
        assert output.pair_problem(*(folder / "out" / name for name in (MODEL, LORA))) is None, where
        assert names(folder / "out") == [MODEL, LORA], where
        if fingerprint(folder) == before:
            continue
        assert fingerprint(folder / "out") == new, where  # a name given, but not known to be on disk
        assert failing.calls[number - 1] in ("fsync", "link", "posix_fallocate"), where
        powercut.run(folder, seed=1, overwrite=True)


def test_a_limit_of_the_kernel_is_said_and_nothing_is_left(old):
    folder, before = old
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(ValueError, match="; free some space"):
            powercut.run(folder, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert fingerprint(folder) == before


@pytest.mark.parametrize("make", [
    lambda: publication.write_text(Path("/sys/mine.toml"), "text"),
    lambda: journal.Journal([Path("/sys/model.safetensors")], {}).__enter__(),
    lambda: publication.create_hidden(Path("/sys/cache.safetensors")),
])  # fmt: skip
def test_a_folder_that_cannot_be_written_is_said(make):
    with pytest.raises(ValueError, match=r"/sys: cannot be written to \((Permission denied|Operation not permitted|"
                                         r"Read-only file system)\); choose another folder"):  # fmt: skip
        make()


# ---- names


def test_hidden_files_are_on_the_disk_of_their_target_also_across_links_and_two_disks(folder, tmp_path_factory):
    """A rename across devices is a copy; there is none."""
    memory = Path("/dev/shm") / f"tessera-{os.getpid()}"
    memory.mkdir()
    try:
        link = folder / "link"
        link.symlink_to(memory)
        seen = {}

        def progress(step):
            for path in (*memory.glob(".*.part"), *(folder / "out").glob(".*.part")):
                seen[path.name.split(".")[1]] = path.stat().st_dev

        chosen = powercut.recipe.find(folder / "mine.toml")
        work = powercut.job.Job(Checkpoint(folder / "source.safetensors"), link / MODEL, chosen, rank=2,
                                lora=folder / "out" / LORA)  # fmt: skip
        work.run(progress)
        assert seen == {"model": memory.stat().st_dev, "model_lora": (folder / "out").stat().st_dev}
        assert names(memory) == [MODEL] and names(folder / "out") == [LORA] and link.is_symlink()
    finally:
        for path in memory.iterdir():
            path.unlink()
        memory.rmdir()


def test_a_file_that_comes_at_the_last_moment_is_not_replaced(tmp_path):
    path = tmp_path / "x.safetensors"
    with Writer(path, {}, 200) as writer, pytest.raises(ValueError, match="already exists"):
        writer.finish({})
        writer.reread(Checkpoint(writer.temporary))
        path.write_bytes(b"somebody else's")
        publication._rename(writer.temporary, path, False)
    assert path.read_bytes() == b"somebody else's" and names(tmp_path) == [path.name]


def test_a_link_that_leads_nowhere_is_a_file_that_is_there(tmp_path):
    path = tmp_path / "x.safetensors"
    path.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ValueError, match="already exists"):
        write(path)
    assert path.is_symlink()


def test_disks_without_hard_links_get_whole_files_too(old, new, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    folder, before = old
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="could not get its name"):
        failing_second_rename(patch)
        powercut.run(folder, overwrite=True)
    assert fingerprint(folder) == before
    powercut.run(folder, overwrite=True)
    assert fingerprint(folder / "out") == new
    write(folder / "x.safetensors")
    with pytest.raises(ValueError, match="already exists"):
        write(folder / "x.safetensors")


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("problem", [OSError(errno.EBUSY, "Device or resource busy"), KeyboardInterrupt()])
def test_a_model_that_cannot_get_its_name_takes_its_lora_back(old, there, problem):
    folder, before = old
    if not there:
        for name in (MODEL, LORA):
            (folder / "out" / name).unlink()
        before = fingerprint(folder)
    with pytest.MonkeyPatch.context() as patch, pytest.raises((RuntimeError, KeyboardInterrupt)):
        failing_second_rename(patch, problem)
        powercut.run(folder, overwrite=True)
    assert fingerprint(folder) == before


def failing_second_rename(patch, problem=None):
    """The model's name is refused: another program has the old file open, on Windows."""
    replace = os.replace

    def refuse(a, b):
        if Path(b).name == MODEL:
            raise problem or OSError(errno.EBUSY, "Device or resource busy")
        replace(a, b)

    patch.setattr(os, "replace", refuse)


# ---- several writers


@pytest.mark.parametrize("overwrite", [False, True])
def test_jobs_with_one_target_leave_the_pair_of_one_of_them(folder, monkeypatch, overwrite):
    rename, refused = publication._rename, []
    monkeypatch.setattr(publication, "_rename", lambda *arguments: (rename(*arguments), time.sleep(0.1)))

    def run(seed):
        try:
            powercut.run(folder, seed=seed, overwrite=overwrite)
        except ValueError as problem:
            refused.append(str(problem))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names(folder / "out") == [MODEL, LORA]
    assert output.pair_problem(*(folder / "out" / name for name in (MODEL, LORA))) is None
    assert len(refused) == (0 if overwrite else 2) and all("already exists" in words for words in refused)


def test_what_dead_processes_left_goes_and_what_living_ones_write_stays(tmp_path):
    dead = [tmp_path / name for name in (".x.safetensors.lone-0a1b2c3d.part", ".y.safetensors.lone-0a1b2c3d.part")]
    kept = [tmp_path / name for name in (".y.safetensors.0a1b2c3d.part", ".y.safetensors.0a1b2c3d.journal", ".z.part")]
    for path in (*dead, *kept):
        path.write_bytes(b"left")
    with Writer(tmp_path / "x.safetensors", {}, 200) as alive:
        write(tmp_path / "x.safetensors", overwrite=True)
        publication.write_text(tmp_path / "mine.toml", "text")
        assert names(tmp_path) == sorted(
            [*(path.name for path in kept), alive.temporary.name, "x.safetensors", "mine.toml"]
        )
    killed_writer(tmp_path)
    assert any(".lone-" in name for name in names(tmp_path))
    write(tmp_path / "other.safetensors")
    assert not any(".lone-" in name for name in names(tmp_path))


def killed_writer(folder):
    code = """
import os, sys
sys.path.insert(0, sys.argv[1])
import conftest
conftest.load_pack()
from tessera.writer import Path, Writer
Writer(Path(sys.argv[2]) / "x.safetensors", {}, 200, overwrite=True)
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code, str(TESTS), str(folder)]).returncode == -9


# ---- reading back


def test_what_is_verified_comes_from_the_disk_not_from_memory(tmp_path, monkeypatch):
    """The system is told to forget the file's pages, after they were synced."""
    told, fsync, advise = [], os.fsync, os.posix_fadvise
    monkeypatch.setattr(os, "fsync", lambda file: (told.append("sync"), fsync(file)))
    monkeypatch.setattr(os, "posix_fadvise", lambda *how: (told.append(how[1:]), advise(*how)))
    write(tmp_path / "x.safetensors")
    assert told[:2] == ["sync", (0, 0, os.POSIX_FADV_DONTNEED)]


# ---- every other writer


def text(folder, value):
    publication.write_text(folder / "out" / "made.toml", f"value = {value}\n", overwrite=True)


def calibration(folder, value):
    made = killed.calibration.Calibration(_statistics(value), {"a": "a"}, "model", 1)
    calibration_file.write(made, folder / "out" / "made.safetensors", overwrite=True)


def _statistics(value):
    site = killed.calibration.Accumulator(8)
    site.add(torch.full((16, 8), float(value)))
    return {"a": site.statistics()}


def cache(folder, value):
    made = transcode.Transcoded(FP8Row(), FP8Row().pack(FP8Row().encode(torch.full((4, 8), float(value)))), 0.0, 0.0)
    kept = transcode.Cache(folder / "out" / "made.safetensors")
    kept.add("a", f"{value}", made)
    kept.save()


def extraction(folder, value):
    if not (folder / "base.safetensors").exists():
        extracting.write_pair(folder)
    paths = [next(folder.glob(f"{name}*.safetensors")) for name in ("base", "tuned")]
    Extraction(*paths, folder / "out" / "made.safetensors", Wish(rank=value), overwrite=True).run()


WRITERS = pytest.mark.parametrize("write_it", [text, calibration, cache, extraction], ids=lambda f: f.__name__)


@WRITERS
def test_every_writer_leaves_the_old_file_or_the_new_one_whichever_call_fails(tmp_path, write_it):
    (tmp_path / "out").mkdir()
    write_it(tmp_path, 2)
    new = fingerprint(tmp_path / "out")
    write_it(tmp_path, 1)
    before = fingerprint(tmp_path / "out")
    with Disk()() as disk:
        write_it(tmp_path, 2)
    assert fingerprint(tmp_path / "out") == new != before and {"write", "fsync", "replace"} <= set(disk.calls)
    for number in range(1, len(disk.calls) + 1):
        write_it(tmp_path, 1)
        with Disk(number, errno.EDQUOT)(), contextlib.suppress(ValueError, RuntimeError):
            write_it(tmp_path, 2)
        assert fingerprint(tmp_path / "out") in (before, new), disk.calls[number - 1]


@WRITERS
def test_every_writer_reads_back_what_it_wrote(tmp_path, write_it, monkeypatch):
    (tmp_path / "out").mkdir()
    write_it(tmp_path, 1)
    before, forget = fingerprint(tmp_path / "out"), publication.forget

    def spoil(file):
        forget(file)
        size = os.fstat(file.fileno()).st_size
        byte = os.pread(file.fileno(), 1, size - 2)
        os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), size - 2)

    monkeypatch.setattr(publication, "forget", spoil)
    monkeypatch.setattr("tessera.writer.forget", spoil)
    with pytest.raises(RuntimeError, match="back other than it was written"):
        write_it(tmp_path, 2)
    assert fingerprint(tmp_path / "out") == before


def test_a_recipe_is_written_like_every_file_and_never_over_another(tmp_path, monkeypatch):
    monkeypatch.setattr(planning.Plan, "toml", lambda self: "value = 1\n")
    plan = planning.Plan.__new__(planning.Plan)
    with Disk(2, errno.ENOSPC)(), pytest.raises(ValueError, match="; free some space"):
        plan.save(tmp_path / "mine.toml")
    assert names(tmp_path) == []
    assert plan.save(tmp_path / "mine.toml").read_text() == "value = 1\n"
    with pytest.raises(ValueError, match="already exists"):
        plan.save(tmp_path / "mine.toml")


def test_a_repaired_file_is_written_like_every_file(tmp_path):
    source = TESTS / "golden" / "mislabel_nvfp4.safetensors"
    with Disk()() as disk:
        repairing.repair(source, tmp_path / "all.safetensors")
    for number in range(1, len(disk.calls) + 1):
        target = tmp_path / f"{number}.safetensors"
        with Disk(number, errno.ENOSPC)(), contextlib.suppress(ValueError, RuntimeError):
            repairing.repair(source, target)
        assert not target.exists() or target.read_bytes() == (tmp_path / "all.safetensors").read_bytes()
    assert all(name.endswith(".safetensors") for name in names(tmp_path))


def test_a_bake_is_a_job_and_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    folder = test_baking.folder.__wrapped__(tmp_path, monkeypatch)
    before = fingerprint(folder)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="could not get its name"):
        patch.setattr(publication, "_rename", refuse_after(1))
        test_baking.bake("style.safetensors:1")
    assert fingerprint(folder) == before


def refuse_after(count):
    """So many files get their names; the next does not."""
    rename, done = publication._rename, []

    def refuse(part, path, overwrite):
        if len(done) == count:
            raise RuntimeError(f"{path}: the finished file could not get its name")
        done.append(rename(part, path, overwrite))

    return refuse


# ---- a source that changes


def grown(path):
    with open(path, "ab") as file:
        file.write(b"\0" * 8)


def touched(path):
    os.utime(path)


def replaced(path):
    """By another of its size and date."""
    facts, data = path.stat(), path.read_bytes()
    path.with_name("new").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    path.with_name("new").rename(path)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def rewritten_with_its_old_date(path):
    facts = path.stat()
    with open(path, "r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def removed(path):
    path.unlink()


@pytest.mark.parametrize("change", [grown, touched, replaced, rewritten_with_its_old_date, removed],
                         ids=lambda f: f.__name__)  # fmt: skip
@pytest.mark.parametrize("when", ["layer", "verifying"])
def test_a_source_that_changes_while_it_is_read_is_refused_and_nothing_saved(old, change, when):
    folder, before = old
    chosen, path = powercut.recipe.find(folder / "mine.toml"), folder / "source.safetensors"
    work = powercut.job.Job(Checkpoint(path), folder / "out" / MODEL, chosen, rank=2, overwrite=True)
    done = []

    def progress(step):
        if not done and step.index == 2 and step.verifying == (when == "verifying"):
            time.sleep(0.05)  # the digest is past it
            done.append(change(path))

    with pytest.raises((RuntimeError, ValueError, OSError), match=r"source\.safetensors"):
        work.run(progress)
    assert fingerprint(folder / "out") == {
        name.removeprefix("out/"): sha256 for name, sha256 in before.items() if name.startswith("out/")
    }


def test_links_and_permissions_are_no_change_of_the_source(old, new):
    folder, _ = old
    path = folder / "source.safetensors"
    chosen = powercut.recipe.find(folder / "mine.toml")
    work = powercut.job.Job(Checkpoint(path), folder / "out" / MODEL, chosen, rank=2, overwrite=True)
    work.run(lambda step: (os.chmod(path, 0o600), (folder / "another").unlink(missing_ok=True),
                           os.link(path, folder / "another")))  # fmt: skip
    assert fingerprint(folder / "out") == new


def test_extraction_refuses_checkpoints_that_change(tmp_path):
    base, tuned = extracting.write_pair(tmp_path)
    work = Extraction(base, tuned, tmp_path / "made.safetensors", Wish(rank=2))
    with pytest.raises(RuntimeError, match="was changed while it was read, nothing was saved"):
        work.run(lambda step: os.utime(tuned))
    assert names(tmp_path) == sorted(path.name for path in (base, tuned))
