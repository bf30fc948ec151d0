"""Processes that torchrun has started again find each other, whoever of them comes first."""

import json
import os
import subprocess
import sys

import pytest
import torch.distributed as dist

from clip_train.errors import FaultError
from clip_train.training import torchrun

PROCESS = """
import json, os, sys, time
import torch, torch.distributed as dist
from clip_train.training.launch import find_world
print("imported", flush=True)
sys.stdin.readline()
world = find_world("cpu", "auto", 1)
dist.init_process_group("gloo")
rank = torch.tensor([dist.get_rank()])
dist.all_reduce(rank)
print(json.dumps([int(rank), os.environ["TORCHELASTIC_RESTART_COUNT"]]), flush=True)
sys.stdin.readline()
os._exit(1)  # as one that is killed: nothing is closed or taken back
"""


@pytest.fixture
def agent():
    return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


def start(agent: dist.TCPStore, rank: int, restart_count: int) -> subprocess.Popen:
    variables = {
        "TORCHELASTIC_RUN_ID": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": restart_count,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": agent.port,
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "LOCAL_WORLD_SIZE": 2,
    }
    env = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", PROCESS], env=env, stdin=pipe, stdout=pipe, text=True)
    assert answer(process) == "imported\n"
    return process


def answer(process: subprocess.Popen) -> str:
    assert process.stdout
    return process.stdout.readline()


def go_on(process: subprocess.Popen) -> None:
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()


def test_a_restarted_rank_does_not_look_for_the_dead(agent):
    for attempt, (first, second) in enumerate([(0, 1), (1, 0), (0, 1)]):
        counts = [attempt, 0]  # one node of torchrun counts, the other one has joined in
        ranks = [start(agent, rank, counts[rank]) for rank in (0, 1)]
        go_on(ranks[first])
        with pytest.raises(subprocess.TimeoutExpired):
            ranks[first].wait(1)  # for the other one
        go_on(ranks[second])
        for rank in ranks:
            assert json.loads(answer(rank)) == [1, str(attempt)]
        for rank in ranks:
            go_on(rank)
            rank.wait(60)


def test_ranks_that_do_not_come_are_an_error(agent, monkeypatch):
    values = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "localhost", "MASTER_PORT": str(agent.port)}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torchrun, "default_pg_timeout", torchrun.default_pg_timeout / 1800)
    for rank in (0, 1):
        with pytest.raises(FaultError, match="do not find each other"):
            torchrun.meet(rank, 2)
    agent.set("clip_train/present/1", "one that has died")
    with pytest.raises(FaultError, match="do not find each other: nobody answers"):
        torchrun.meet(0, 2)


def test_a_store_that_is_lost_is_an_error(monkeypatch):
    agent = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    values = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "localhost", "MASTER_PORT": str(agent.port)}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torchrun, "default_pg_timeout", torchrun.default_pg_timeout / 900)
    del agent
    with pytest.raises(FaultError, match="do not find each other"):
        torchrun.meet(1, 2)


def test_a_new_store_does_not_make_a_restart_a_start(agent, monkeypatch):
    values = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "localhost", "MASTER_PORT": str(agent.port)}
    for name, value in {**values, "TORCHELASTIC_RESTART_COUNT": "2"}.items():
        monkeypatch.setenv(name, value)
    assert torchrun.meet(0, 1)
    assert os.environ["TORCHELASTIC_RESTART_COUNT"] == "2"
    torchrun.meet.cache_clear()
