"""The indexes of many shards, of which some may be damaged."""

from collections.abc import Generator, Sequence
from functools import partial

from clip_train.data.index import ShardIndex
from clip_train.data.shard_cache import CacheError
from clip_train.data.tar_scan import scan_tar
from clip_train.errors import DataError
from clip_train.shard_tools.access import ShardAccess
from clip_train.shard_tools.damage import Damage
from clip_train.shard_tools.parallel import run_parallel

SHARD_UNREADABLE = "shard_unreadable"


def index_shards(
    shards: Sequence[str], access: ShardAccess, num_workers: int, rescan: bool = False
) -> Generator[ShardIndex | Damage, None, None]:
    """The index of each shard, in no order, or why it has none.

    Args:
        shards: paths and URLs.
        access: how they are reached, and where the indexes are kept.
        num_workers: processes.
        rescan: read all headers even if there is an index, as they may have been damaged since.
    """
    yield from run_parallel(partial(_index_shard, access=access, rescan=rescan), shards, num_workers)


def build_indexes(shards: Sequence[str], access: ShardAccess, num_workers: int) -> Generator[ShardIndex, None, None]:
    """Build the indexes that are missing, in no order.

    Raises:
        DataError: a shard is damaged, or an index cannot be written.
    """
    for result in index_shards(shards, access, num_workers):
        if isinstance(result, Damage):
            raise DataError(result.detail)
        if not result.is_kept:
            where = access.cache_dir or "beside it"
            raise DataError(f"the index of {result.shard} cannot be written {where}: give cache_dir= another folder")
        yield result


def _index_shard(shard: str, access: ShardAccess, rescan: bool) -> ShardIndex | Damage:
    try:
        if rescan:
            with access.local(shard) as path:
                for _ in scan_tar(path):
                    pass
        return access.index(shard)
    except CacheError:
        raise
    except (DataError, OSError) as error:
        return Damage(SHARD_UNREADABLE, shard, "", str(error))
