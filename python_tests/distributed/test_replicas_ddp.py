"""Real ranks under DistributedDataParallel, in matrix mode and in packed mode.

Different masks are an error on each of them.
"""

from __future__ import annotations

import pytest
import torch
from helpers.ranks import run_ranks

# All cases with the same number of ranks run in the same processes, one after the other.
CASES = {  # number of ranks, ranks that choose another entry, first mask that differs
    "two": (2, (1,), 0),
    "three, the last": (3, (2,), 0),
    "three, the first": (3, (0,), 0),
    "refresh": (2, (1,), 1),
    "alike": (2, (), 0),
}
MODES = ("matrix", "packed")
WORKER = """
join()

def run(mode, different, first):
    masks = []

    def selection(weight, k):  # one entry of one matrix differs
        chosen = torch.arange(k, dtype=torch.int32)
        chosen[-1] += int(rank in different and weight.shape == (6, 20) and len(masks) >= 2 * first)
        masks.append(1)
        return chosen

    options = dict(rank=3, density=0.2, selection=selection)
    model = build()
    convert = pack_gradients if mode == "packed" else lift_param_groups
    groups = convert(model, freeze_rest=True, **(options if mode == "packed" else {}))
    parallel = DistributedDataParallel(model)
    optimizer = LiftAdamW(groups, lr=0.1, refresh_interval=2, **options)
    said = ""
    for step in range(6):
        backward(parallel, step)
        before = [p.detach().clone() for p in model.parameters()]
        try:
            optimizer.step()
        except RuntimeError as error:
            said = f"step {step}: {error}"
            assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before)), "refused, but something changed"
            break
        optimizer.zero_grad()
    return said, [p.detach() for p in model.parameters()]

found = {(name, mode): run(mode, different, first)
         for name, (ranks, different, first) in CASES.items() if ranks == world for mode in ("matrix", "packed")}
torch.save(found, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The error of each rank in each case, and the parameters that it ended with."""
    results = {}
    for world in (2, 3):
        folder = tmp_path_factory.mktemp("ranks")
        run_ranks(f"CASES = {CASES!r}\n{WORKER}", world, folder)
        of_ranks = [torch.load(folder / f"{rank}.pt") for rank in range(world)]
        results |= {case: [of_rank[case] for of_rank in of_ranks] for case in of_ranks[0]}
    return results


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ["two", "three, the last", "three, the first"])
def test_one_other_entry_is_refused_by_every_rank(found, case, mode):
    for said, _ in found[case, mode]:
        assert said.startswith("step 0: ranks "), said
        assert f"different entries of 2.{'values' if mode == 'packed' else 'weight'}: " in said


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_refresh_that_differs_is_refused_at_the_next_step(found, mode):
    for said, _ in found["refresh", mode]:
        assert said.startswith("step 2: ranks 0 and 1 would train different entries"), said


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_equal_masks_train_alike(found, mode):
    (said, one), (also_said, other) = found["alike", mode]
    assert said == also_said == "" and all(torch.equal(a, b) for a, b in zip(one, other))


UNSEEDED = """
join()
model = build(seed=rank)  # DDP would give all ranks the weights of rank 0, but masks are made before
groups = pack_gradients(model, rank=3, density=0.2, freeze_rest=True)
parallel = DistributedDataParallel(model)
optimizer = LiftAdamW(groups, lr=0.1)
backward(parallel, 0)
try:
    optimizer.step()
except RuntimeError as error:
    print(error)
dist.destroy_process_group()
"""


def test_masks_of_unseeded_ranks_are_refused(tmp_path):
    for output in run_ranks(UNSEEDED, 2, tmp_path):
        assert "ranks 0 and 1 would train different entries of 0.values and of 1 more matrices" in output
        assert "broadcast rank 0's before pack_gradients" in output


ROLES = """
from lift_kernels.distributed import replicas
replicas.PATIENCE_S = 1e6  # a rank that waits for one without an optimizer hangs
join()
pair = dist.new_group([0, 1])
if rank < 2:
    replicated = build()
    optimizer = LiftAdamW(lift_param_groups(replicated), rank=3, density=0.2, lr=0.1, refresh_interval=2)
    parallel = DistributedDataParallel(replicated, process_group=pair)
    for step in range(5):
        backward(parallel, step)
        optimizer.step()
        optimizer.zero_grad()
    named = LiftAdamW(lift_param_groups(replicated), rank=3, density=0.2, process_group=pair)
    backward(parallel, 9)
    named.step()
alone = build(seed=rank)  # of one name on all ranks, but no replicas
optimizer = LiftAdamW(lift_param_groups(alone), rank=3, density=0.2, process_group="independent")
for _ in range(2):
    backward(alone, 0)
    optimizer.step()
    optimizer.refresh()

# A second process group has another store, where everything starts from zero.
server = dist.TCPStore("127.0.0.1", 0, world, True, wait_for_workers=False) if rank == 0 else None
port = [None if server is None else server.port]
dist.broadcast_object_list(port)
store = server or dist.TCPStore("127.0.0.1", port[0], world, False)
dist.destroy_process_group()
dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
optimizer = LiftAdamW(lift_param_groups(build(seed=0)), rank=3, density=0.2)
optimizer.refresh()
dist.barrier()
optimizer.step()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_without_an_optimizer_are_not_waited_for(tmp_path):
    """Two replicas train beside a rank that trains nothing.

    Others use a process group, are meant to differ, or use a second process group.
    """
    run_ranks(ROLES, 3, tmp_path)


LATE = """
from lift_kernels.distributed import replicas
replicas.PATIENCE_S = 1e6
model = build()
optimizer = LiftAdamW(lift_param_groups(model), rank=3, density=0.2, seed=rank, selection="random")
join()
backward(DistributedDataParallel(model), 0)
try:
    optimizer.step()
except RuntimeError as error:
    print(error)
dist.destroy_process_group()
"""


def test_an_optimizer_older_than_the_process_group(tmp_path):
    for output in run_ranks(LATE, 2, tmp_path):
        assert "ranks 0 and 1 would train different entries of 0.weight" in output


LEAVING = """
import os, time
from pathlib import Path
from lift_kernels.distributed import digest_exchange
digest_exchange.LINGER_S = 1e6
address = Path(folder, "port")
if rank == 0:  # the store lives in this process
    store = dist.TCPStore("127.0.0.1", 0, world, True, wait_for_workers=False)
    address.with_suffix(".new").write_text(str(store.port))
    address.with_suffix(".new").rename(address)
else:
    while not address.exists():
        time.sleep(0.01)
    store = dist.TCPStore("127.0.0.1", int(address.read_text()), world, False)
dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
model = build()
optimizer = LiftAdamW(lift_param_groups(model), rank=3, density=0.2, seed=rank, selection="random")
backward(DistributedDataParallel(model), 0)
if rank == 1:
    missing = digest_exchange.DigestExchange._missing
    # Slow to read what differs.
    digest_exchange.DigestExchange._missing = lambda *arguments: (missing(*arguments), time.sleep(1))[0]
try:
    optimizer.step()
except RuntimeError as error:
    print(error, flush=True)
os._exit(0)
"""


def test_the_rank_that_holds_the_store_leaves_last(tmp_path):
    """Its error ends the process, and the store ends with it.

    By then the others must have seen the difference.
    """
    for output in run_ranks(LEAVING, 2, tmp_path):
        assert "ranks 0 and 1 would train different entries of 0.weight" in output, output
