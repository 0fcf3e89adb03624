"""A rival that merges neighbouring layers: LaCo (arXiv 2402.11187).

From the top downwards, layer l takes theta_l + sum_k (theta_{l+k} - theta_l) and the layers behind
it go, as long as the last hidden states stay similar to the original model's. The authors' notebook
updates theta_l in place: the sum telescopes to the last layer of the group, the form `last`.
"""
import copy

import torch
import torch.nn.functional as F

from analysis.rivals.common import Pruned, text_batches
from model_ftp import FTPModel

JUDGES = 10                     # samples that similarity is measured on, as in the paper
GROUPS = (2, 3, 4)              # layers that become one; the paper leaves it to the user
THRESHOLDS = [t / 100 for t in range(95, -101, -5)]     # from strict to lax
INTERVAL = 2                    # layers that the walk goes down after a merge
LAYER = "model.layers."

# A merged model is `layers`, a tuple of a tuple a layer: ((original layer, coefficient), ...).


def combine(parts, get):
    """Sum of coefficient * get(original layer) over the parts ((layer, coefficient), ...)."""
    if len(parts) == 1:
        return get(parts[0][0])
    return sum(c * get(i) for i, c in parts)


def original(n_layer):
    """The layers of the model as it is."""
    return tuple(((i, 1),) for i in range(n_layer))


def merge(layers, l, m, last):
    """Merge the m layers after l into it -> layers.

    Its weights: theta_l + sum_k (theta_l+k - theta_l), or with `last` theta_l+m.
    """
    if last:
        new = layers[l + m]
    else:
        total = {}                          # original layer: coefficient
        add_layer(total, layers[l], 1 - m)
        for layer in layers[l + 1:l + m + 1]:
            add_layer(total, layer, 1)
        new = tuple(sorted(total.items()))
    return layers[:l] + (new,) + layers[l + m + 1:]


def add_layer(total, layer, weight):
    """Add weight times a layer to {original layer: coefficient}."""
    for i, c in layer:
        total[i] = total.get(i, 0) + weight * c


def merged_block(model, layer):
    """The Block of one of `layers`; the model's own where nothing is merged."""
    block = model.blocks[layer[0][0]]
    if len(layer) == 1:
        return block
    block = copy.deepcopy(block)
    for name, parameter in block.named_parameters():
        parameter.data = combine(layer, lambda i, n=name: model.blocks[i].get_parameter(n).data)
    return block


@torch.inference_mode()
def last_states(model, texts, layers):
    """Normed last hidden states (N, d), float32, of each Batch of `texts` under merged layers."""
    blocks, out = [merged_block(model, layer) for layer in layers], []
    for batch in texts:
        x = model.begin(batch).x
        for block in blocks:
            x, _, _ = block.prefill(x, batch.all, batch, None)
        out.append(model.norm(x).float())
    return out


class Similarity:
    """layers -> mean cosine of last hidden states and the original model's, over the texts' tokens.

    Equal layers run once.
    """
    def __init__(self, model, texts):
        self.model, self.texts, self.known = model.use(), texts, {}
        self.teacher = last_states(model, texts, original(model.config.n_layer))

    def __call__(self, layers):
        if layers not in self.known:
            states = last_states(self.model, self.texts, layers)
            cosines = [F.cosine_similarity(a, b, dim=-1) for a, b in zip(self.teacher, states)]
            self.known[layers] = float(torch.cat(cosines).mean())
        return self.known[layers]


def collapse(n_layer, gone, threshold, score, last, group, interval=INTERVAL):
    """The walk from the top -> layers: merge where the similarity stays above the threshold.

    Ends when `gone` layers are gone or the bottom is reached. score: a Similarity; group: layers
    that become one.
    """
    layers, l = original(n_layer), n_layer - group
    while l >= 1 and n_layer - len(layers) < gone:
        to_go = gone - (n_layer - len(layers))
        m = min(group - 1, len(layers) - 1 - l, to_go)
        new = merge(layers, l, m, last)
        if score(new) > threshold:
            layers = new
            l = min(l - interval, len(layers) - group)
        else:
            l -= 1
    return layers


def best_of_groups(n_layer, gone, score, last):
    """(similarity, threshold, group, layers) without `gone` layers.

    For each size of a group the highest threshold that removes enough; of these the result most
    similar to the original.
    """
    found = []
    for group in GROUPS:
        for threshold in THRESHOLDS:
            layers = collapse(n_layer, gone, threshold, score, last, group)
            if n_layer - len(layers) == gone:
                found.append((score(layers), threshold, group, layers))
                break
    return max(found)


def merged_tensors(tensors, layers):
    """A checkpoint's {name: tensor} with its layers merged."""
    first = f"{LAYER}0."
    names = [name.removeprefix(first) for name in tensors if name.startswith(first)]
    new = {name: t for name, t in tensors.items() if not name.startswith(LAYER)}
    for i, layer in enumerate(layers):
        for name in names:
            def of_layer(j, name=name):
                return tensors[f"{LAYER}{j}.{name}"]
            new[f"{LAYER}{i}.{name}"] = combine(layer, of_layer)
    return new


def laco(model, samples, levels, tensors, last=False):
    """Layers merged until each level's share is gone; a layer's share of the FLOPs is 1 / n_layer.

    tensors: of the checkpoint.
    """
    n_layer = model.config.n_layer
    score = Similarity(model, text_batches(model, samples[:JUDGES]))
    for level in levels:
        best = best_of_groups(n_layer, round(level * n_layer), score, last)
        cosine, threshold, group, layers = best
        changes = {"num_hidden_layers": len(layers), "layer_types": None}
        yield level, Pruned(merged_tensors(tensors, layers), changes, FTPModel), {
            "form": "last layer of the group" if last else "sum of differences",
            "group": group,
            "threshold": threshold,
            "cosine": cosine,
            "layers": layers,
        }
