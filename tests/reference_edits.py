"""ROME and MEMIT once more, slowly: one row at a time, a transformer written out by hand, explicit sums, float64.

Shares nothing with the library but the tokenizer. `forward` is the whole model; a value is put in by giving
`forward` a change of one block's MLP output at one token.
"""

from __future__ import annotations

import math

import torch

KEY, VALUE, STATE = range(3)  # of a trace: the down-projection's input, its output, the block's output


def llama(weights, config, ids, change=None, trace=None):
    """Logits `[T, V]` of a Llama. `change` = (block, token, vector); `trace` collects keys and values."""
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    base = config.rope_parameters["rope_theta"]

    def norm(x, name):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config.rms_norm_eps) * weights[name]

    def rotate(x):  # [T, heads, size]
        rotated = torch.empty_like(x)
        for i in range(size // 2):
            angle = torch.arange(len(x), dtype=torch.float64) / base ** (2 * i / size)
            cos, sin = angle.cos()[:, None], angle.sin()[:, None]
            a, b = x[..., i], x[..., i + size // 2]
            rotated[..., i], rotated[..., i + size // 2] = a * cos - b * sin, b * cos + a * sin
        return rotated

    x = weights["model.embed_tokens.weight"][ids]
    for block in range(config.num_hidden_layers):
        at = f"model.layers.{block}"
        h = norm(x, f"{at}.input_layernorm.weight")
        q, k, v = (
            (h @ weights[f"{at}.self_attn.{n}_proj.weight"].T).reshape(len(ids), -1, size) for n in "qkv"
        )
        out = attention(rotate(q), rotate(k), v, heads // groups)
        x = x + out @ weights[f"{at}.self_attn.o_proj.weight"].T
        h = norm(x, f"{at}.post_attention_layernorm.weight")
        gate = h @ weights[f"{at}.mlp.gate_proj.weight"].T
        key = gate / (1 + torch.exp(-gate)) * (h @ weights[f"{at}.mlp.up_proj.weight"].T)
        x = written(x, key, key @ weights[f"{at}.mlp.down_proj.weight"].T, block, change, trace)
    return norm(x, "model.norm.weight") @ weights["lm_head.weight"].T


def gpt2(weights, config, ids, change=None, trace=None):
    """Logits `[T, V]` of a GPT-2; the same arguments."""

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + config.layer_norm_epsilon)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def conv(x, name):
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = weights["transformer.wte.weight"][ids] + weights["transformer.wpe.weight"][: len(ids)]
    for block in range(config.n_layer):
        at = f"transformer.h.{block}"
        q, k, v = conv(norm(x, f"{at}.ln_1"), f"{at}.attn.c_attn").chunk(3, -1)
        q, k, v = (t.reshape(len(ids), config.n_head, -1) for t in (q, k, v))
        x = x + conv(attention(q, k, v, 1), f"{at}.attn.c_proj")
        h = conv(norm(x, f"{at}.ln_2"), f"{at}.mlp.c_fc")
        key = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = written(x, key, conv(key, f"{at}.mlp.c_proj"), block, change, trace)
    return norm(x, "transformer.ln_f") @ weights["transformer.wte.weight"].T


def attention(q, k, v, share):
    """Causal attention, head by head; `share` query heads use one key head."""
    future = torch.ones(len(q), len(q)).triu(1).bool()
    heads = []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // share].T / math.sqrt(q.shape[2])
        portion = torch.softmax(scores.masked_fill(future, -math.inf), -1)
        heads.append(portion @ v[:, head // share])
    return torch.cat(heads, -1)


def written(x, key, value, block, change, trace):
    if trace is not None:
        trace[block] = key, value, x + value
    if change is not None and change[0] == block:
        value = torch.stack([row + change[2] if t == change[1] else row for t, row in enumerate(value)])
    return x + value


class Reference:
    """The two editors for one tiny model. ASCII texts only: tokens are found by the length of their text."""

    def __init__(self, model, tokenizer, prefixes, texts, *, ridge, window=64):
        self.run = {"llama": llama, "gpt2": gpt2}[model.config.model_type]
        self.config, self.tokenizer, self.prefixes = model.config, tokenizer, prefixes
        self.weights = {n: t.detach().double().clone() for n, t in model.state_dict().items()}
        self.name = {
            "llama": "model.layers.{}.mlp.down_proj.weight",
            "gpt2": "transformer.h.{}.mlp.c_proj.weight",
        }[model.config.model_type]
        self.texts, self.ridge, self.window = texts, ridge, window

    def forward(self, ids, change=None, trace=None):
        return self.run(self.weights, self.config, torch.tensor(ids), change, trace)

    def matrix(self, layer):
        weight = self.weights[self.name.format(layer)]
        return weight.T if self.run is gpt2 else weight

    def add(self, layer, change):
        self.weights[self.name.format(layer)] += change.T if self.run is gpt2 else change

    def covariance(self, layer):
        keys = []
        for text in self.texts:
            ids = self.tokenizer(text)["input_ids"]
            for i in range(0, len(ids), self.window):
                trace = {}
                self.forward(ids[i : i + self.window], trace=trace)
                keys.append(trace[layer][KEY])
        keys = torch.cat(keys)
        total = torch.zeros(keys.shape[1], keys.shape[1], dtype=torch.float64)
        for key in keys:
            total += torch.outer(key, key)
        total /= len(keys)
        return total + self.ridge * total.diagonal().mean() * torch.eye(len(total))

    def encoded(self, text, stop):
        """Ids of `text`, and the index of the token with its character `stop - 1`."""
        ids = self.tokenizer(text)["input_ids"]
        length = 0
        for index, token in enumerate(ids):
            length += len(self.tokenizer.decode([token]))
            if length >= stop:
                return ids, index
        raise AssertionError(text)

    def rows(self, fact):
        found = []
        for prefix in self.prefixes:
            text = prefix + fact.prompt
            stop = len(prefix) + fact.prompt.rindex(fact.subject) + len(fact.subject)
            ids, position = self.encoded(f"{text} {fact.target}", stop)
            count = len(ids) - len(self.tokenizer(text)["input_ids"])
            found.append((ids, position, count))
        return found

    def value(self, fact, layer, how, what=VALUE):
        """(v0, delta, loss at the last evaluation) by Adam written out; v0 the MLP's output or the block's."""
        rows = self.rows(fact)
        essence, at = self.encoded(f"{fact.subject} is a", len(fact.subject))
        trace = {}
        self.forward(rows[0][0], trace=trace)
        start = trace[layer][what][rows[0][1]]
        old = torch.log_softmax(self.forward(essence)[at], 0)
        delta = torch.zeros_like(start)
        first, second = torch.zeros_like(delta), torch.zeros_like(delta)
        for step in range(1, how["steps"] + 1):
            probe = delta.clone().requires_grad_()
            loss = how["weight_decay"] * probe.norm() / (start @ start)
            for ids, position, count in rows:
                logits = self.forward(ids, change=(layer, position, probe))
                for k in range(len(ids) - count, len(ids)):
                    loss = loss - torch.log_softmax(logits[k - 1], 0)[ids[k]] / (count * len(rows))
            new = torch.log_softmax(self.forward(essence, change=(layer, at, probe))[at], 0)
            p, q = (old, new) if how.get("kl") == "forward" else (new, old)
            for word in range(len(p)):
                loss = loss + how["kl_factor"] * p[word].exp() * (p[word] - q[word])
            if loss < how["stop_below"]:
                break
            (gradient,) = torch.autograd.grad(loss, probe)
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            delta = delta - how["lr"] * (first / (1 - 0.9**step)) / (
                torch.sqrt(second / (1 - 0.999**step)) + 1e-8
            )
            if delta.norm() > how["clamp"] * start.norm():
                delta = delta * how["clamp"] * start.norm() / delta.norm()
        return start, delta, float(loss.detach())

    def key(self, fact, layer, share=None):
        """Mean key; `share` is the bare prompt's weight in it."""
        rows = self.rows(fact)
        share = 1 / len(rows) if share is None else share
        total = 0.0
        for number, (ids, position, _) in enumerate(rows):
            trace = {}
            self.forward(ids, trace=trace)
            total = (
                total + (share if not number else (1 - share) / (len(rows) - 1)) * trace[layer][KEY][position]
            )
        return total

    def rome(self, fact, layer, how, covariance=True, at_prompt=False):
        start, delta, _ = self.value(fact, layer, how)
        key = self.key(fact, layer)
        u = torch.linalg.inv(self.covariance(layer)) @ key if covariance else key
        u = u / u.norm()
        bias = self.weights.get(self.name.format(layer).replace("weight", "bias"), 0.0)
        key = self.key(fact, layer, 1.0) if at_prompt else key
        gap = start + delta - bias - self.matrix(layer) @ key
        self.add(layer, torch.outer(gap, u) / (u @ key))

    def memit(self, facts, layers, how, lam, share=None):
        wanted = []
        for fact in facts:
            start, delta, _ = self.value(fact, layers[-1], how, STATE)
            wanted.append(start + delta)
        moments = [self.covariance(layer) for layer in layers]  # of the unedited model
        for number, layer in enumerate(layers):
            keys = [self.key(fact, layer, share) for fact in facts]
            total = lam * moments[number]
            for key in keys:
                total = total + torch.outer(key, key)
            inverse = torch.linalg.inv(total)
            change = torch.zeros_like(self.matrix(layer))
            for fact, key, z in zip(facts, keys, wanted, strict=True):
                ids, position, _ = self.rows(fact)[0]
                trace = {}
                self.forward(ids, trace=trace)
                residual = (z - trace[layers[-1]][STATE][position]) / (len(layers) - number)
                change += torch.outer(residual, inverse @ key)
            self.add(layer, change)
