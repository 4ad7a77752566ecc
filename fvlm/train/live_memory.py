"""Which memory is alive while code runs: every storage that an operation makes, until nobody holds it any more.

Works on real tensors and on the meta device, where shapes and lifetimes are the code's own and nothing is computed.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fvlm.kernels.launching import Launch, Recording, recording


class LiveMemory(TorchDispatchMode):
    """While active, counts bytes of new storages by the category that is current when they are made.

    A storage counts once, however many views it has, and leaves the count when it is freed. What is moved between
    devices counts on every device alike; `device` limits the count to one.
    """

    def __init__(self, device: str | None = None):
        super().__init__()
        self.device = device
        self.category = "other"
        """Of what is made from now on."""
        self.live: Counter[str] = Counter()
        """Bytes by category, now."""
        self.peak: Counter[str] = Counter()
        """Bytes by category at the moment when their sum was largest."""
        self.num_ops = 0
        """Operations that made or changed memory: about as many kernels are launched."""
        self._known: dict[int, list] = {}  # storage → [its category, bytes]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = _OWN.get(func._schema.name)
        on_meta = own is not None and args[0].is_meta
        out = self._run_host_function(own, args) if on_meta else func(*args, **(kwargs or {}))
        num_new = sum(self.count(x) for x in tree_leaves(out))
        if num_new or func._schema.is_mutable:
            self.num_ops += 1
        return out

    def count(self, value: Any) -> bool:
        """Take a tensor's storage into the count; whether it was not in it."""
        if not isinstance(value, Tensor) or (self.device is not None and value.device.type != self.device):
            return False
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._known or not storage.nbytes():
            return False
        self._known[key] = entry = [self.category, storage.nbytes()]
        weakref.finalize(storage, self._free, key, entry)
        self.live[self.category] += entry[1]
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()
        return True

    def recategorise(self, value: Tensor, category: str) -> None:
        """Count a tensor's storage under another category from now on."""
        entry = self._known[value.untyped_storage()._cdata]
        self.live[entry[0]] -= entry[1]
        self.live[category] += entry[1]
        entry[0] = category

    def start_peak(self) -> None:
        """Forget the peak: the next phase begins with what is alive now."""
        self.peak = self.live.copy()

    @contextmanager
    def within(self, category: str) -> Iterator[None]:
        """New memory counts under `category`."""
        before, self.category = self.category, category
        try:
            yield
        finally:
            self.category = before

    def _free(self, key: int, entry: list) -> None:
        if self._known.get(key) is entry:
            del self._known[key]
            self.live[entry[0]] -= entry[1]

    def _run_host_function(self, own: tuple[str, str, str], args: Any) -> Any:
        """An op of ours on the meta device: its host function, which allocates what it would, without its kernels."""
        op, function, category = own
        module = __import__(f"fvlm.kernels.{op}.kernel", fromlist=[function])
        with self, self.within(category), recording(_Nothing()):
            out = getattr(module, function)(*args)
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata in self._known:
                self.recategorise(x, self.category)  # what it returns is no scratch
        return out


class _Nothing(Recording):
    """Launches whose tensors nobody keeps alive."""

    def append(self, launch: Launch) -> None:
        pass


def saved_bytes(saved: Iterable[Tensor], beside: Iterable[Tensor]) -> int:
    """Bytes of the storages of `saved`, each once, without those of `beside`."""
    excluded = {x.untyped_storage()._cdata for x in beside}
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in saved}
    return sum(size for key, size in storages.items() if key not in excluded)


_OWN = {
    "fvlm::query_attention": ("query_attention", "forward", "kernels"),
    "fvlm::query_attention_backward": ("query_attention", "backward", "kernels"),
    "fvlm::varlen_attention": ("varlen_attention", "forward", "kernels"),
    "fvlm::varlen_attention_backward": ("varlen_attention", "backward", "kernels"),
    "fvlm::linear_cross_entropy": ("linear_cross_entropy", "forward", "logits"),
    "fvlm::linear_cross_entropy_backward": ("linear_cross_entropy", "backward", "logits"),
}
"""Our ops → (folder, host function, category of its scratch)."""
