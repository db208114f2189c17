"""The token cache: gives what the tokenizer gives, once a text, and mends itself."""

import json
import logging
import multiprocessing
import resource
import signal
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxembed.data.cache import build_token_cache, text_hash
from jaxembed.errors import InputError

TEXTS = ["def f():", "", "日本語 🙂", "def f():", "\n", "another one", "日本語 🙂"]


class ByteTokenizer:
    """Bytes, after a token for the role; counts what it is asked."""

    def __init__(self, fingerprint="bytes", delay=0.0):
        self.fingerprint = fingerprint
        self.asked = []
        self.delay = delay

    def __call__(self, texts, role):
        time.sleep(self.delay)
        self.asked += texts
        return [np.array([{"query": 256, "document": 257}[role], *text.encode()], np.int32) for text in texts]


def build(directory, texts=TEXTS, role="document", tokenizer=None, source="s", **options):
    return build_token_cache(
        texts,
        role,
        tokenizer or ByteTokenizer(),
        source_fingerprint=source,
        directory=directory,
        progress=False,
        **options,
    )


def assert_holds(cache, texts, role="document"):
    expected = ByteTokenizer()(texts, role)
    assert len(cache) == len(texts)
    for i, ids in enumerate(expected):
        assert cache[i].dtype == np.int32
        np.testing.assert_array_equal(cache[i], ids)
    np.testing.assert_array_equal(cache.lengths, [len(ids) for ids in expected])
    np.testing.assert_array_equal(cache.hashes, np.array([text_hash(text) for text in texts], np.uint64))


@given(texts=st.lists(st.text(max_size=8), max_size=30), batch=st.integers(1, 7))
@settings(max_examples=25, deadline=None)
def test_holds_what_the_tokenizer_gives(tmp_path_factory, texts, batch):
    tokenizer = ByteTokenizer()
    cache = build(tmp_path_factory.mktemp("cache"), texts, tokenizer=tokenizer, batch=batch)
    assert_holds(cache, texts)
    assert tokenizer.asked == list(dict.fromkeys(texts))


@given(texts=st.lists(st.text(max_size=8), max_size=30, unique=True), batch=st.integers(1, 7))
@settings(max_examples=25, deadline=None)
def test_distinct_texts_are_read_in_batches(tmp_path_factory, texts, batch):
    class OnDisk:
        """Counts how many texts are asked for at once."""

        def __len__(self):
            return len(texts)

        def __getitem__(self, index):
            if isinstance(index, slice):
                assert index.stop - index.start <= batch
            return texts[index]

    home = tmp_path_factory.mktemp("cache")
    cache = build(home, OnDisk(), batch=batch, distinct=True)
    assert_holds(cache, texts)
    assert cache.rows is None
    again = build(home, OnDisk(), tokenizer=(tokenizer := ByteTokenizer()), distinct=True)
    assert_holds(again, texts)
    assert tokenizer.asked == []
    assert not (cache.directory / "rows.npy").exists()
    if texts:
        assert isinstance(again.offsets.base, np.memmap)
    # It is another cache than that of texts which may repeat.
    assert_holds(build(home, texts), texts)
    assert len(list(home.iterdir())) == 2


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy", "hashes.npy", "meta.json"])
def test_a_damaged_one_of_distinct_texts_is_built_again(tmp_path, caplog, name):
    texts = list(dict.fromkeys(TEXTS))
    path = build(tmp_path, texts, distinct=True).directory / name
    path.write_bytes(path.read_bytes()[:-3])
    assert_holds(build(tmp_path, texts, distinct=True), texts)
    assert "is damaged" in caplog.text


def test_is_used_again(tmp_path, caplog):
    build(tmp_path)
    tokenizer = ByteTokenizer()
    with caplog.at_level(logging.INFO):
        cache = build(tmp_path, tokenizer=tokenizer)
    assert tokenizer.asked == []
    assert "token cache hit: 7 texts" in caplog.text
    assert_holds(cache, TEXTS)
    assert not cache[0].flags.writeable
    assert isinstance(cache.tokens.base, np.memmap)


def test_source_tokenizer_and_role_make_the_key(tmp_path):
    build(tmp_path)
    for other in ({"role": "query"}, {"tokenizer": ByteTokenizer("other")}, {"source": "other"}):
        assert_holds(build(tmp_path, **other), TEXTS, other.get("role", "document"))
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy", "hashes.npy", "rows.npy", "meta.json"])
@pytest.mark.parametrize("harm", ["truncated", "emptied", "removed"])
def test_a_damaged_one_is_built_again(tmp_path, caplog, name, harm):
    cache = build(tmp_path)
    path = cache.directory / name
    if harm == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: -3 if harm == "truncated" else 0])
    assert_holds(build(tmp_path), TEXTS)
    assert f"{cache.directory} is damaged" in caplog.text
    caplog.clear()
    assert_holds(build(tmp_path), TEXTS)
    assert "damaged" not in caplog.text
    assert list(tmp_path.iterdir()) == [cache.directory]


def test_one_of_other_texts_is_built_again(tmp_path, caplog):
    build(tmp_path)
    assert_holds(build(tmp_path, TEXTS[:-1]), TEXTS[:-1])
    assert "holds other texts" in caplog.text


def test_a_failing_tokenizer_leaves_nothing(tmp_path):
    class Failing(ByteTokenizer):
        def __call__(self, texts, role):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        build(tmp_path, tokenizer=Failing())
    assert list(tmp_path.iterdir()) == []


def _build_slowly(directory, barrier, results):
    barrier.wait()
    cache = build(directory, tokenizer=ByteTokenizer(delay=0.01), batch=1)
    results.put([cache[i].tolist() for i in range(len(cache))])


def test_processes_that_build_at_once(tmp_path):
    context = multiprocessing.get_context("forkserver")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_build_slowly, args=(tmp_path, barrier, results)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    expected = [ids.tolist() for ids in ByteTokenizer()(TEXTS, "document")]
    assert found == [expected] * 3
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_an_error_that_names_the_place(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(InputError, match=rf"cannot write the token cache in {tmp_path}: .*too large"):
            build(tmp_path, [f"text {i}" for i in range(1000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_text_hash():
    # Reference: coreutils, printf 'é' | b2sum -l 64
    assert text_hash("é").to_bytes(8, "little").hex() == "cb1abf8beff3192f"


def test_the_digest_is_that_of_what_was_tokenised(tmp_path):
    cache = build(tmp_path / "one")
    same, other = build(tmp_path / "two", source="elsewhere"), build(tmp_path / "three", ["another text"])
    assert cache.digest == same.digest != other.digest
    meta = cache.directory / "meta.json"
    recorded = json.loads(meta.read_text())
    assert recorded.pop("sha256") == cache.digest
    meta.write_text(json.dumps(recorded))  # as caches were before
    assert build(tmp_path / "one").digest == cache.digest
    nothing = build(tmp_path / "four", [])
    meta = nothing.directory / "meta.json"
    meta.write_text(
        json.dumps({name: value for name, value in json.loads(meta.read_text()).items() if name != "sha256"})
    )
    assert build(tmp_path / "four", []).digest == nothing.digest
