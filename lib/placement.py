"""A model larger than one device: its blocks on several, states move from block to block."""
import re
from dataclasses import fields, replace

import torch

from lib.checkpoint import exported_routing, load_weights, read_config
from lib.files import check
from model_ftp import FTPModel

SPACE = 0.9    # share of a GPU's free memory for weights, the rest is for states and cache


class PlacedModel(FTPModel):
    """FTPModel whose blocks lie on several devices, one process working through them in turn."""

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, spec="auto"):
        """As FTPModel.from_pretrained; spec: see place_blocks()."""
        folder, config = read_config(path)
        places = place_blocks(spec, config, dtype.itemsize)
        ends = {"embed": places[0], "norm": places[-1], "head": places[-1]}

        def device_of(name):
            parts = name.split(".")
            return places[int(parts[1])] if parts[0] == "blocks" else ends[parts[0]]

        with torch.device("meta"):
            model = cls(config)
        load_weights(model, folder, dtype, device_of)
        model.name = str(path)
        if routing := exported_routing(folder):
            model.use(**routing)
        return model.eval()

    def place_of(self, l):
        """Device of block l."""
        return self.blocks[l].norm1.weight.device

    # what routes a block moves its tokens there; all that follows works on what these return

    def route(self, l, batch, state, noise=0.0):
        batch, state = self.move(l, batch, state)
        return super().route(l, batch, state, noise)

    def route_new(self, l, batch, state, noise=0.0):
        batch, state = self.move(l, batch, state)
        return super().route_new(l, batch, state, noise)

    def margins(self, l, batch, state):
        batch, state = self.move(l, batch, state)
        return super().margins(l, batch, state)

    def move(self, l, batch, state):
        """Batch and State on the device of block l."""
        place = self.place_of(l)
        return batch_to(batch, place), state_to(state, place)

    def ask(self, l, f, memory):
        """The router lies with the embedding; its answer goes back to the block."""
        memory = None if memory is None else memory.to(self.device)
        margin, memory = super().ask(l, f.to(self.device), memory)
        return margin.to(f.device), memory

    def logits(self, x):
        x = self.norm(x.to(self.norm.weight.device))
        return self.head(x.to(self.head.weight.device))


def batch_to(batch, device):
    """The Batch on `device`; one copy a device is made and remembered by the batch."""
    if batch.ids.device == device:
        return batch
    return batch.on(device)


def state_to(state, device):
    """The State on `device`."""
    if state.x.device == device:
        return state
    scores = state.scores
    moved = {f.name: getattr(scores, f.name) for f in fields(scores)}
    moved |= {k: t.to(device) for k, t in moved.items() if torch.is_tensor(t)}
    if scores.pending is not None:
        kept, q, k, window = scores.pending
        moved["pending"] = kept_to(kept, device), q.to(device), k.to(device), window
    kept = None if state.kept is None else kept_to(state.kept, device)
    return replace(state, x=state.x.to(device), scores=type(scores)(**moved), kept=kept)


def kept_to(kept, device):
    """The Kept on `device`."""
    tensors = kept.rows, kept.margin, kept.free
    rows, margin, free = (None if t is None else t.to(device) for t in tensors)
    return type(kept)(batch_to(kept.batch, device), rows, kept.counts, margin, free)


def place_blocks(spec, config, itemsize, free=None):
    """The device of each block, a list.

    spec: like "cuda:0=0-15,cuda:1=16-31", or "auto": neighbours together, spread by weight over the
    fewest GPUs that hold the model in nine tenths of their free memory; the CPU where there is no
    GPU. The embedding goes with the first block, the final norm with the last, the head with the
    last or, where it is tied, with the embedding. free: bytes of each GPU, by default those that
    are free now. FTPError where a block has no place, or the GPUs are too small.
    """
    if spec != "auto":
        return places_of(spec, config.n_layer)
    L, half = config.n_layer, config.n_layer // 2
    if free is None:
        n_gpu = torch.cuda.device_count()
        free = [torch.cuda.mem_get_info(i)[0] for i in range(n_gpu)]
    if not free:
        return [torch.device("cpu")] * L
    ends = config.vocab_size * config.hidden_size * itemsize
    sizes = torch.full((L,), float(config.p_attn + config.p_mlp)) * itemsize
    sizes[0] += ends
    sizes[-1] += 0 if config.tied else ends
    need = float(sizes.sum())
    enough = [n for n in range(1, len(free) + 1) if need <= SPACE * sum(free[:n])]
    check(enough, f"--device_map auto: the weights take {need / 1e9:.1f} GB, the GPUs have "
                  f"{sum(free) / 1e9:.1f} GB free; take a smaller --dtype, or leave some blocks to "
                  f"the CPU, like cuda:0=0-{half},cpu={half + 1}-{L - 1}")
    n = enough[0]
    edges = torch.tensor(free[:n]).cumsum(0) / sum(free[:n])
    middles = (sizes.cumsum(0) - sizes / 2) / sizes.sum()
    return [torch.device("cuda", i) for i in torch.bucketize(middles, edges[:-1]).tolist()]


def places_of(spec, L):
    """Devices of the blocks 0 to L - 1 by a list of ranges."""
    parts = [re.fullmatch(r"(cpu|cuda:\d+)=(\d+)-(\d+)", s) for s in spec.split(",")]
    places = []
    for m in filter(None, parts):
        places += [(l, m[1]) for l in range(int(m[2]), int(m[3]) + 1)]
    places.sort()
    whole = all(parts) and [l for l, _ in places] == list(range(L))
    check(whole, f"--device_map {spec}: give auto, or each of the blocks 0 to {L - 1} once, like "
                 f"cuda:0=0-{L // 2},cuda:1={L // 2 + 1}-{L - 1}")
    devices = [torch.device(name) for _, name in places]
    n_gpu = torch.cuda.device_count()
    check(all(d.type != "cuda" or d.index < n_gpu for d in devices),
          f"--device_map {spec}: there are {n_gpu} GPUs here; name only those")
    return devices
