"""The feature cache: keyed by contents, bounded, shared, and never worse than none."""

import os
import threading
import time
from pathlib import Path

import pytest
import torch

from omni.cache import FeatureCache


@pytest.fixture
def files(tmp_path):
    paths = []
    for name in "abcd":
        path = tmp_path / f"{name}.bin"
        path.write_bytes(name.encode() * 100)
        paths.append(str(path))
    return paths


class Encoder:
    """Counts how often it is asked."""

    def __init__(self):
        self.calls = 0

    def of(self, size=1000):
        def compute():
            self.calls += 1
            return [torch.full((size,), 7.0, dtype=torch.float16), torch.arange(3)]

        return compute


def test_a_shard_is_found_by_contents_whatever_the_files_are_called(tmp_path, files):
    cache, encoder = FeatureCache(tmp_path / "cache"), Encoder()
    first = cache.get("images", "encoder", files, encoder.of())
    moved = []
    for path in files:
        (tmp_path / "moved").mkdir(exist_ok=True)
        moved.append(str(tmp_path / "moved" / Path(path).name))
        os.link(path, moved[-1])
        os.utime(moved[-1], (1, 1))
    found = FeatureCache(tmp_path / "cache").get("images", "encoder", moved, encoder.of())
    assert encoder.calls == 1 and all(torch.equal(a, b) for a, b in zip(first, found, strict=True))


def test_other_contents_order_encoder_or_kind_are_other_shards(tmp_path, files):
    cache, encoder = FeatureCache(tmp_path / "cache"), Encoder()
    cache.get("images", "encoder", files, encoder.of())
    cache.get("images", "another", files, encoder.of())
    cache.get("audio", "encoder", files, encoder.of())
    cache.get("images", "encoder", files[::-1], encoder.of())
    cache.get("images", "encoder", files[:3], encoder.of())
    Path(files[1]).write_bytes(b"x" * 100)  # as many bytes as before
    cache.get("images", "encoder", files, encoder.of())
    assert encoder.calls == 6 == len(list((tmp_path / "cache").iterdir()))


def test_the_least_recently_used_go_first_and_the_limit_holds(tmp_path, files):
    folder, encoder = tmp_path / "cache", Encoder()
    for number, path in enumerate(files[:3]):
        FeatureCache(folder, 0.1).get("images", "encoder", [path], encoder.of())
        for shard in folder.iterdir():  # the file system's clock may be coarse
            os.utime(shard, ns=(shard.stat().st_atime_ns, shard.stat().st_mtime_ns - 10**9 * (3 - number)))
    FeatureCache(folder, 0.1).get("images", "encoder", files[:1], encoder.of())  # used again: the newest now
    size = max(shard.stat().st_size for shard in folder.iterdir())
    FeatureCache(folder, 3.9 * size / 1e9).get("images", "encoder", files[3:], encoder.of())
    assert sum(shard.stat().st_size for shard in folder.iterdir()) <= 3.9 * size
    assert encoder.calls == 4
    kept = FeatureCache(folder, 0.1)
    for path in (files[0], files[2], files[3]):
        kept.get("images", "encoder", [path], encoder.of())
    assert encoder.calls == 4
    kept.get("images", "encoder", files[1:2], encoder.of())
    assert encoder.calls == 5  # the second was the least recently used


def test_a_run_does_not_remove_its_own_shards(tmp_path, files, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("omni.cache.log.warning", lambda text, *values: said.append(text % values))
    cache, encoder = FeatureCache(tmp_path / "cache", 5000 / 1e9), Encoder()
    for path in files:
        cache.get("images", "encoder", [path], encoder.of(1000))
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert len(said) == 1 and "full (feature_cache_gb = 5e-06)" in said[0]
    assert cache.get("images", "encoder", files[:1], encoder.of()) and encoder.calls == 4


def test_none_is_kept_at_zero(tmp_path, files):
    cache, encoder = FeatureCache(tmp_path / "cache", 0), Encoder()
    for _ in range(2):
        cache.get("images", "encoder", files, encoder.of())
    assert encoder.calls == 2 and not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, files):
    (tmp_path / "cache").write_text("a file where the folder should be")
    cache, encoder = FeatureCache(tmp_path / "cache"), Encoder()
    assert torch.equal(cache.get("images", "encoder", files, encoder.of())[1], torch.arange(3))


@pytest.mark.parametrize("seed", range(40))
def test_any_flipped_byte_is_found_or_means_nothing(seed, tmp_path, files):
    cache, encoder = FeatureCache(tmp_path / "cache"), Encoder()
    true = cache.get("images", "encoder", files, encoder.of(50))
    (shard,) = (tmp_path / "cache").iterdir()
    data = bytearray(shard.read_bytes())
    place = torch.randint(len(data), (), generator=torch.Generator().manual_seed(seed))
    data[int(place)] ^= 1 << seed % 8
    shard.write_bytes(data)
    found = cache.get("images", "encoder", files, encoder.of(50))
    assert len(found) == 2 and all(torch.equal(a, b) for a, b in zip(true, found, strict=True))


def test_several_writers_leave_a_whole_shard(tmp_path, files):
    encoder, found = Encoder(), []

    def work():
        for _ in range(10):
            cache = FeatureCache(tmp_path / "cache", 3000 / 1e9)
            for path in files:
                found.append(cache.get("images", "encoder", [path], encoder.of(500)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 160 and all(torch.equal(item[1], torch.arange(3)) for item in found)
    assert not list((tmp_path / "cache").glob(".*"))


def test_what_killed_processes_left_is_removed_after_an_hour(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    for name, age in (("old", 7200), ("new", 60)):
        partial = folder / f".features-{name}.npz.0123.partial"
        partial.write_bytes(b"half")
        os.utime(partial, (time.time() - age, time.time() - age))
    FeatureCache(folder)
    assert [path.name for path in folder.iterdir()] == [".features-new.npz.0123.partial"]
