"""A small transformer under FSDP2 with averaged weights, saved so that any number of processes can go on from it.

    torchrun --nproc-per-node 2 examples/fsdp2.py --steps 100
    torchrun --nproc-per-node 4 examples/fsdp2.py --steps 200       # goes on from the last checkpoint

On CPUs with gloo, on GPUs with NCCL. The text is Python's own documentation; the model guesses its next character.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ewma

TEXT = "\n".join(topics.values())
CHARACTERS = sorted(set(TEXT))
CODES = torch.tensor([CHARACTERS.index(character) for character in TEXT])
TRAINING, HELD_OUT = CODES[:-20_000], CODES[-20_000:]
ROWS, LENGTH = 16, 32  # of the batch of all ranks together


class Transformer(nn.Module):
    def __init__(self, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(CHARACTERS), width)
        self.place = nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 4 * width, 0.0, batch_first=True, norm_first=True, bias=False)
            for _ in range(layers)
        )
        self.head = nn.Linear(width, len(CHARACTERS), bias=False)

    def forward(self, codes: Tensor) -> Tensor:
        length = codes.shape[1]
        x = self.embed(codes) + self.place(torch.arange(length, device=codes.device))
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=codes.device, dtype=x.dtype)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.head(x)


def loss_of(model: nn.Module, codes: Tensor, seed: int) -> Tensor:
    """The loss on this rank's rows of a batch that depends on the seed alone, not on the number of ranks."""
    starts = torch.randint(len(codes) - LENGTH, (ROWS,), generator=torch.Generator().manual_seed(seed))
    rows = torch.stack([codes[start : start + LENGTH + 1] for start in starts])
    mine = rows.chunk(dist.get_world_size())[dist.get_rank()].to(next(model.parameters()).device)
    return nn.functional.cross_entropy(model(mine[:, :-1]).flatten(0, 1), mine[:, 1:].flatten())


def train(
    folder: Path, steps: int, every: int, report: Callable[[int, float], None]
) -> tuple[nn.Module, ewma.ModelEMA]:
    """Train until so many steps, from the last whole checkpoint in the folder on; save one at every so many."""
    torch.manual_seed(0)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    model = Transformer().to(device)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ema = ewma.ModelEMA(model, half_life=20).attach(optimizer)

    first = 0
    whole = sorted(path.parent for path in folder.glob("step_*/.metadata"))  # which is written last
    if whole:
        parts = {**as_saved(model, optimizer), "ema": ema, "step": 0}
        dcp.load(parts, checkpoint_id=whole[-1])
        set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
        first = parts["step"]
    for step in range(first, steps):
        optimizer.zero_grad()
        loss = loss_of(model, TRAINING, step)
        loss.backward()
        optimizer.step()
        report(step + 1, loss.item())
        if (step + 1) % every == 0:
            parts = {**as_saved(model, optimizer), "ema": ema, "step": step + 1}
            dcp.save(parts, checkpoint_id=folder / f"step_{step + 1:06d}")
    return model, ema


def as_saved(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


@torch.no_grad()
def held_out_loss(model: nn.Module) -> float:
    """Over a few batches, of all ranks together."""
    total = sum(loss_of(model, HELD_OUT, seed) for seed in range(8)) / 8
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="until which step to train")
    parser.add_argument("--every", type=int, default=20, help="how many steps apart checkpoints are")
    parser.add_argument("--out", type=Path, default=Path("build/fsdp2"), help="the folder of the checkpoints")
    options = parser.parse_args()
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    first = dist.get_rank() == 0

    def report(step: int, loss: float) -> None:
        if first and step % 10 == 0:
            print(f"step {step}: loss {loss:.3f}", flush=True)

    model, ema = train(options.out, options.steps, options.every, report)
    raw = held_out_loss(model)
    with ema.swapped():
        averaged = held_out_loss(model)
    written = ewma.checkpoints.export(ema, options.out / "averaged")
    if first:
        print(
            f"held out: raw {raw:.3f}, averaged {averaged:.3f} (updates: {ema.count}, ranks: {dist.get_world_size()})"
        )
        print(f"the averaged model, for any tool: {written[0]}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
