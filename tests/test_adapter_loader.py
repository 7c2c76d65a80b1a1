"""AdapterLoader: whatever a file makes a reader do, the next one is read."""

from __future__ import annotations

import gc
import weakref

from octavo.engine.adapter_loader import AdapterLoader
from octavo.errors import AdapterError
from octavo.lora.adapter import Adapter, AdapterInfo

INFO = AdapterInfo(content_hash="0", rank=1, num_bytes=1, modules=())


class Panic(BaseException):
    """What a library of another language raises: no Exception."""


class Weights:
    """Something that was read so far."""


def read(loader: AdapterLoader, name: str) -> AdapterInfo | AdapterError:
    loader.read(Adapter(name=name, path=name, adapter_id=0))
    loader.wait(30)
    return loader.take()


def test_a_reader_that_panics_is_one_adapters_fault() -> None:
    def load(adapter_id: int, path: str) -> AdapterInfo:
        if path == "bad":
            raise Panic("out of range")
        return INFO

    loader = AdapterLoader(load)
    failed = read(loader, "bad")
    assert isinstance(failed, AdapterError)
    assert "Panic: out of range" in str(failed)
    assert read(loader, "good") == INFO
    loader.stop()


def test_a_failed_read_keeps_nothing_of_what_it_read() -> None:
    kept: list[weakref.ref[Weights]] = []

    def load(adapter_id: int, path: str) -> AdapterInfo:
        weights = Weights()
        kept.append(weakref.ref(weights))
        raise AdapterError("its last tensor is no number")

    loader = AdapterLoader(load)
    failed = read(loader, "bad")
    gc.collect()
    assert str(failed) == "its last tensor is no number"
    assert kept[0]() is None
    loader.stop()
