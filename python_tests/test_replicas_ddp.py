"""Real ranks under DistributedDataParallel: different masks are an error on each of them, in matrix and in packed mode."""

from __future__ import annotations

import pytest
import torch
from rank_helpers import run_ranks

# DDP gives every rank the weights of rank 0, but the packed masks come before it and a callable chooses as it likes.
WORKER = """
mode, different, refresh = {mode!r}, {different!r}, {refresh!r}
join()
unlike = rank in different

def selection(weight, k):  # one entry of one matrix differs
    chosen = torch.arange(k, dtype=torch.int32)
    chosen[-1] += int(unlike and weight.shape == (6, 20) and len(refreshes) >= refresh)
    refreshes.append(1)
    return chosen

refreshes = []
options = dict(rank=3, density=0.2, selection=selection)
model = build()
groups = pack_gradients(model, freeze_rest=True, **options) if mode == "packed" else lift_param_groups(model, freeze_rest=True)
parallel = DistributedDataParallel(model)
optimizer = LiftAdamW(groups, lr=0.1, refresh_interval=2, **options)
said = []
for step in range(6):
    backward(parallel, step)
    before = [p.detach().clone() for p in model.parameters()]
    try:
        optimizer.step()
    except RuntimeError as error:
        said.append(f"step {{step}}: {{error}}")
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before)), "refused, but something changed"
        break
    optimizer.zero_grad()
torch.save([p.detach() for p in model.parameters()], f"{{folder}}/{{rank}}.pt")
print(*said, sep="")
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["matrix", "packed"])
@pytest.mark.parametrize(("world", "different"), [(2, (1,)), (3, (2,)), (3, (0,))])
def test_one_other_entry_is_refused_by_every_rank(tmp_path, mode, world, different):
    worker = WORKER.format(mode=mode, different=different, refresh=0)
    for output in run_ranks(worker, world, tmp_path):
        assert output.startswith("step 0: ranks "), output
        assert f"different entries of 2.{'values' if mode == 'packed' else 'weight'}: " in output


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["matrix", "packed"])
def test_a_refresh_that_differs_is_refused_at_the_next_step(tmp_path, mode):
    for output in run_ranks(WORKER.format(mode=mode, different=(1,), refresh=2), 2, tmp_path):  # two matrices a refresh
        assert output.startswith("step 2: ranks 0 and 1 would train different entries"), output


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["matrix", "packed"])
def test_equal_masks_train_alike(tmp_path, mode):
    assert [output.strip() for output in run_ranks(WORKER.format(mode=mode, different=(), refresh=0), 2, tmp_path)] == ["", ""]
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other))


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
dist.barrier()
dist.destroy_process_group()
dist.init_process_group("gloo", init_method=f"file://{folder}/second", rank=rank, world_size=world)  # a new store, a new start
optimizer = LiftAdamW(lift_param_groups(build(seed=0)), rank=3, density=0.2)
optimizer.refresh()
dist.barrier()
optimizer.step()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_without_an_optimizer_are_not_waited_for(tmp_path):
    """Two replicas beside a rank that trains nothing; a process group; ranks that are meant to differ; a second process group."""
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
