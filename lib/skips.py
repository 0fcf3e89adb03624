"""Which tokens of a prompt compute which blocks, as the pass that ran decided it."""
import torch


@torch.inference_mode()
def prefill_with_map(model, prompt, cache=None, meter=None):
    """As FTPModel.prefill of one prompt -> logits (1, vocab), and who computed: (n_layer, N) bool
    on the CPU."""
    batch = model.batch([prompt], last_only=True)
    state, rows = model.begin(batch), []
    for l in range(model.config.n_layer):
        state = model.prefill_step(l, batch, state, cache, meter)
        rows.append(state.kept.mask.cpu())
    if cache is not None:
        cache.seen[batch.rows] += batch.lengths
    return model.logits(state.x[batch.last.to(state.x.device)]), torch.stack(rows)
