"""torchrun starts processes again without telling them apart from those before: here they are told apart."""

import os
import time
from dataclasses import dataclass
from functools import cache
from uuid import uuid4

from torch.distributed import DistError, DistStoreError, PrefixStore, Store, TCPStore
from torch.distributed.constants import default_pg_timeout

from clip_train.errors import FaultError, first_line

_POLL = 0.1  # seconds


@dataclass(frozen=True)
class Stores:
    """What the processes of torchrun can tell each other before they are connected.

    Attributes:
        agent: lasts as long as torchrun, through all restarts.
        own: the first rank's, of this start alone; through it they connect.
    """

    agent: Store
    own: TCPStore | None


@cache
def meet(rank: int, world_size: int) -> Stores | None:
    """Make all processes of this start connect through a store of their own, and agree whether it is a restart.

    torchrun's own store keeps the addresses that processes before a restart have left there, where a quick rank finds
    those of the dead instead of those of the living and hangs (https://github.com/pytorch/pytorch/issues/135712). Its
    nodes also count restarts differently: one whose own process has failed counts, one that joins in does not.

    Sets MASTER_PORT, TORCHELASTIC_USE_AGENT_STORE and TORCHELASTIC_RESTART_COUNT. None where torchrun keeps no store.

    Raises:
        FaultError: not all came within half an hour.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    own = None
    try:
        agent = PrefixStore("clip_train", TCPStore(host, port, is_master=False, timeout=default_pg_timeout))
        if rank == 0:
            own = TCPStore(host, 0, is_master=True, wait_for_workers=False, multi_tenant=True)
            start = agent.add("starts", 1)
            # The store is a new one if the node that had it is lost: then this node's count knows more.
            restarts = max(start - 1, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
            port = own.port
            _invite(agent, start, f"{start} {port} {restarts}", world_size)
        else:
            port, restarts = _accept(agent, rank)
    except DistError as error:
        reason = f"{first_line(error)}: see torchrun's messages"
        raise FaultError(f"the processes that torchrun has started do not find each other: {reason}") from error
    os.environ["MASTER_PORT"] = str(port)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(restarts)
    return Stores(agent, own)


def _invite(agent: Store, start: int, invitation: str, world_size: int) -> None:
    """Tell every rank where to connect, until all have answered to this start.

    Those of an earlier start have left names as well, and so may be invited, but they have ended and do not answer.
    """
    deadline = time.monotonic() + default_pg_timeout.total_seconds()
    present = [f"present/{rank}" for rank in range(1, world_size)]
    while present:
        names = [name.decode() for name in agent.multi_get(present)]
        for name in names:
            agent.set(f"invitation/{name}", invitation)
        if agent.check([f"coming/{start}/{name}" for name in names]):
            return
        if time.monotonic() > deadline:
            raise DistStoreError("nobody answers")
        time.sleep(_POLL)


def _accept(agent: Store, rank: int) -> tuple[int, int]:
    """The port and the number of restarts that this rank is told."""
    name = uuid4().hex
    agent.set(f"present/{rank}", name)
    start, port, restarts = map(int, agent.get(f"invitation/{name}").split())
    agent.set(f"coming/{start}/{name}", "")
    return port, restarts
