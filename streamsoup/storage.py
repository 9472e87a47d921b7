"""From storage straight into a GPU's memory (GPUDirect Storage), by kvikio, where it is installed."""

from __future__ import annotations

import threading
from typing import Any

from streamsoup.checkpoints import Checkpoint
from streamsoup.read import MappedSource, read_error


def way_in_words() -> str:
    """Say how kvikio reads on this machine."""
    import kvikio.defaults

    preferred = getattr(kvikio.defaults, "is_compat_mode_preferred", None)
    by_host = preferred() if preferred is not None else kvikio.defaults.compat_mode()
    return "kvikio, by way of the host: the driver offers no more" if by_host else "kvikio, GPUDirect Storage"


class StorageSource(MappedSource):
    """Delivers into a device's memory; what the host must see itself comes through maps. See `Source`."""

    delivers = True

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self._files: dict[int, Any] = {}
        self._files_lock = threading.Lock()

    def deliver(self, position: int, offset: int, nbytes: int, target: Any) -> None:
        """See `Source`."""
        shard, begin = self._place(position, offset)
        try:
            done = self._file(shard).read(target, nbytes, begin)
            if done != nbytes:
                raise OSError(0, f"{done:,} of {nbytes:,} bytes from byte {begin:,} on came")
        except (OSError, RuntimeError) as error:
            problem = error if isinstance(error, OSError) else OSError(0, str(error).splitlines()[0])
            raise read_error(self._checkpoint.shards[shard], problem) from error

    def _file(self, shard: int) -> Any:
        import kvikio

        with self._files_lock:
            if shard not in self._files:
                self._files[shard] = kvikio.CuFile(self._checkpoint.shards[shard].path, "r")
            return self._files[shard]

    def close(self) -> None:
        """See `Source`."""
        for file in self._files.values():
            file.close()
        super().close()
