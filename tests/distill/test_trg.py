"""trg: what only this method must hold."""

from __future__ import annotations

import math

import pytest
import torch
from distilling import Case, Trained, arguments, rng, shapes, state
from torch import nn

from transfuse.core.errors import BadInput, IncompatibleModels, NotApplicable
from transfuse.core.training import generator, seeded
from transfuse.distill import Distiller
from transfuse.distill._base import Signal
from transfuse.distill._maps import same_grid
from transfuse.distill.trg import (
    TRG,
    contextual_loss,
    cosine_temperature,
    global_loss,
    knn_graph,
    local_loss,
    logit_loss,
    sample_positions,
    squared_distances,
    take,
    tokens_from_map,
)

# --- the definitions, by loops --------------------------------------------------------------------------------


def tokens_of(features):
    """Tokens of maps [B, C, h, w], per image a list of vectors."""
    return [[x[:, i, j] for i in range(x.shape[1]) for j in range(x.shape[2])] for x in features]


def flat(features):
    return [token for image in tokens_of(features) for token in image]


def graph(nodes, fixed, k):
    """A and its edges; neighbours and sigma are those of the fixed nodes."""
    count = len(nodes)
    near, widths = [], []
    for j in range(count):
        d = sorted((float((fixed[i] - fixed[j]).square().sum()), i) for i in range(count) if i != j)
        near.append({i for _, i in d[:k]})
        widths += [value for value, _ in d[:k]]
    sigma = sum(widths) / len(widths)
    a = [[torch.zeros((), dtype=nodes[0].dtype) for _ in range(count)] for _ in range(count)]
    for i in range(count):
        for j in range(count):
            if i in near[j]:
                a[i][j] = torch.exp(-(nodes[i] - nodes[j]).square().sum() / (2 * sigma))
    return a, near


def softmax(values):
    e = [torch.exp(v) for v in values]
    return [x / sum(e) for x in e]


def kl(p, q):
    return sum(a * (torch.log(a) - torch.log(b)) for a, b in zip(p, q, strict=True))


def local_by_hand(ours, theirs, direction="reverse", near=None):
    total = 0.0
    for i in range(len(ours)):
        row = [j for j in range(len(ours)) if near is None or i in near[j]]
        if row:
            q, p = softmax([ours[i][j] for j in row]), softmax([theirs[i][j] for j in row])
            total = total + (kl(q, p) if direction == "reverse" else kl(p, q))
    return total / len(ours)


def global_by_hand(ours, theirs, tau):
    def cosine(a, b):
        return (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()

    total = 0.0
    for i in range(len(ours)):
        e = [torch.exp(cosine(ours[i], theirs[j]) / tau) for j in range(len(ours))]
        total = total - torch.log(e[i] / sum(e))
    return total / len(ours)


def inner_by_hand(ours, theirs):
    total, count = 0.0, 0
    for a, b in zip(tokens_of(ours), tokens_of(theirs), strict=True):
        for i in range(len(a)):
            q = softmax([(a[i] * other).sum() / math.sqrt(len(a[i])) for other in a])
            p = softmax([(b[i] * other).sum() / math.sqrt(len(b[i])) for other in b])
            total = total + sum((x - y) ** 2 for x, y in zip(q, p, strict=True))
            count += len(a)
    return total / count


def logits_by_hand(student, teacher, labels, lam, tau):
    total = 0.0
    for z, t, y in zip(student, teacher, labels, strict=True):
        total = total - torch.log(softmax(list(z))[int(y)])
        total = total + lam * tau**2 * kl(softmax(list(t / tau)), softmax(list(z / tau)))
    return total / len(student)


# --- cases ----------------------------------------------------------------------------------------------------

K, W = 3, 4
WEIGHTS = {
    name: torch.randn(*shape, generator=rng(i), dtype=torch.float64)
    for i, (name, shape) in enumerate(
        {
            "student_projection.weight": (W, 3), "student_projection.bias": (W,),
            "teacher_projection.weight": (W, 5), "teacher_projection.bias": (W,),
        }.items()
    )
}  # fmt: skip
COUPLED = "the graph joins the tokens of all images of a batch"
NO_PADDING = "images have no padding"


def inputs(seed):
    g = rng(seed)
    return {
        "student_map": torch.randn(3, 3, 2, 2, generator=g, dtype=torch.float64),
        "teacher_map": torch.randn(3, 5, 2, 2, generator=g, dtype=torch.float64),
        "student": 2 * torch.randn(3, 6, generator=g, dtype=torch.float64),
        "teacher": 2 * torch.randn(3, 6, generator=g, dtype=torch.float64),
        "labels": torch.randint(0, 6, (3,), generator=g),
    }


def signals(x):
    return (
        Signal(logits=x["student"], taps={"s": x["student_map"]}),
        Signal(logits=x["teacher"], taps={"t": x["teacher_map"]}),
    )


def objective(x, **options):
    """The method as it is used, with given projections."""
    made = TRG(student_layer="s", teacher_layer="t", k=K, width=W, **options)
    made.setup(*signals(x), x)
    if made.gamma:
        made.load_state_dict({**made.state_dict(), **WEIGHTS})
    return made.double() if x["student"].dtype == torch.float64 else made


def run(x, **options):
    return objective(x, **options).requires_grad_(False)(*signals(x), x)


def whole_by_hand(live, fixed):
    ours = graph(flat(live["student_map"]), flat(fixed["student_map"]), K)[0]
    theirs = graph(flat(fixed["teacher_map"]), flat(fixed["teacher_map"]), K)[0]
    sides = []
    for nodes, side in ((live["student_map"], "student"), (fixed["teacher_map"], "teacher")):
        weight, bias = (WEIGHTS[f"{side}_projection.{part}"] for part in ("weight", "bias"))
        sides.append([weight @ token + bias for token in flat(nodes)])
    return (
        logits_by_hand(live["student"], fixed["teacher"], live["labels"], 0.7, 4.0)
        + 0.9 * 4 * inner_by_hand(live["student_map"], fixed["teacher_map"])
        + 2.0 * local_by_hand(ours, theirs)
        + 0.3 * global_by_hand(*sides, 0.5)
    )


def local_case(name, **options):
    near = options.pop("near", False)

    def loss(x):
        return run(x, alpha=0.0, lam=0.0, gamma=0.0, **options)["local"]

    def reference(live, fixed):
        ours, _ = graph(flat(live["student_map"]), flat(fixed["student_map"]), K)
        theirs, edges = graph(flat(fixed["teacher_map"]), flat(fixed["teacher_map"]), K)
        return local_by_hand(ours, theirs, options.get("direction", "reverse"), edges if near else None)

    return Case(
        name, inputs, loss, reference, ("student_map",), couples=COUPLED,
        least=lambda x: {**x, "teacher_map": x["student_map"].clone()},
        without={"padded": NO_PADDING, "excluded": "feature maps are finite"},
    )  # fmt: skip


def inner(x):
    return run(x, lam=0.0, beta=0.0, gamma=0.0, tokens_per_image=2)["inner"]


CASES = [
    local_case("local"),
    local_case("local-forward", direction="forward"),
    local_case("local-masked", masked=True, near=True),
    Case("inner", inputs, inner, lambda live, fixed: inner_by_hand(live["student_map"], fixed["teacher_map"]),
         ("student_map",), least=lambda x: {**x, "teacher_map": x["student_map"].clone()},
         without={"padded": NO_PADDING, "excluded": "feature maps are finite"}),
    Case("logits", inputs, lambda x: logit_loss(x["student"], x["teacher"], x["labels"], lam=0.7, temperature=4.0),
         lambda live, fixed: logits_by_hand(live["student"], fixed["teacher"], live["labels"], 0.7, 4.0),
         ("student",), excluded=lambda x: excluded(x),
         without={"padded": NO_PADDING, "least": "the labels pull away from the teacher"}),
    Case("whole", inputs, lambda x: run(x, lam=0.7, alpha=0.9, beta=2.0, gamma=0.3)["loss"], whole_by_hand,
         ("student", "student_map"), couples=COUPLED, excluded=lambda x: excluded(x),
         without={"padded": NO_PADDING, "least": "labels and negatives pull away from the teacher"}),
]  # fmt: skip


def excluded(x):
    changed = {name: value.clone() for name, value in x.items()}
    changed["student"][:, 0] = -torch.inf
    changed["teacher"][:, 0] = -torch.inf
    changed["labels"][changed["labels"] == 0] = 1
    return changed


# --- training -------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two convolutions, a mean, a head; `down` halves the last map."""

    def __init__(self, width, classes=3, down=1):
        super().__init__()
        self.layer2 = nn.Sequential(nn.Conv2d(1, width, 3, 2, 1), nn.ReLU())
        self.layer3 = nn.Sequential(nn.Conv2d(width, width, 3, down, 1), nn.ReLU())
        self.head = nn.Linear(width, classes)

    def forward(self, pixel_values):
        return self.head(self.layer3(self.layer2(pixel_values)).mean((2, 3)))


def net(seed, *given, **options):
    with seeded(seed):
        return Net(*given, **options)


def pictures(count=24, seed=0):
    """Bars whose place is the class."""
    g = rng(seed)
    found = []
    for i in range(count):
        image = 0.2 * torch.randn(1, 8, 8, generator=g)
        image[:, 2 * (i % 3) : 2 * (i % 3) + 2] += 1.0
        found.append({"pixel_values": image, "labels": torch.tensor(i % 3)})
    return found


def trainer(folder, seed=0, student=None, teacher=None, given=None, **options):
    return Distiller(
        student=student or net(2, 4), teacher=teacher or net(1, 8, down=2), train_dataset=pictures(),
        objective=TRG(k=3, width=8, **(given or {})),
        args=arguments(folder, seed=seed, per_device_train_batch_size=8, learning_rate=1e-2, **options),
    )  # fmt: skip


def train(seed):
    made = trainer("unused", seed, given={"tokens_per_image": 3}, max_steps=60)
    kept, before = state(made.model.readers[0].model), shapes(made.student)
    made.train()
    return Trained(made.losses, made.student, before, [(kept, made.model.readers[0].model)])


# --- values by hand -------------------------------------------------------------------------------------------


def test_a_graph_by_hand():
    """Three points on a line at 0, 1 and 3, one neighbour each: 0 -> 1, 1 -> 0, 3 -> 1."""
    points = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)
    a, edges = knn_graph(points, k=1, sigma=0.5)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    expected[1, 0] = expected[0, 1] = math.exp(-1.0)
    expected[1, 2] = math.exp(-4.0)  # row: the neighbour, column: whose neighbour it is
    assert torch.allclose(a, expected)
    assert torch.equal(edges, expected > 0)
    own, _ = knn_graph(points, k=1)  # mean squared distance (1 + 1 + 4) / 3 = 2
    assert float(own[1, 2]) == pytest.approx(math.exp(-4.0 / 4.0))


def test_absent_edges_count_as_one_before_the_softmax():
    """Rows of two entries by hand: softmax(a, 0) against softmax(b, 0)."""
    ours, theirs = torch.tensor([[0.0, 0.5], [0.0, 0.0]]), torch.tensor([[0.0, 0.2], [0.0, 0.0]])
    q, p = 1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(-0.2))
    row = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    assert float(local_loss(ours, theirs)) == pytest.approx(row / 2, rel=1e-5)
    assert float(local_loss(ours, theirs, reduction="sum")) == pytest.approx(row, rel=1e-5)
    back = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert float(local_loss(ours, theirs, direction="forward")) == pytest.approx(back / 2, rel=1e-5)


def test_one_edge_per_row_leaves_a_masked_loss_nothing():
    edges = torch.tensor([[False, True], [False, False]])
    ours = torch.tensor([[0.0, 0.5], [0.0, 0.0]], requires_grad=True)
    value = local_loss(ours, torch.tensor([[0.0, 0.2], [0.0, 0.0]]), edges=edges)
    assert float(value.detach()) == 0.0
    assert torch.equal(torch.autograd.grad(value, ours)[0], torch.zeros(2, 2))


def test_info_nce_by_hand():
    eye = torch.eye(3, dtype=torch.float64)
    assert float(global_loss(eye, 5 * eye, 0.5)) == pytest.approx(-math.log(math.e**2 / (math.e**2 + 2)))
    total = global_loss(eye, eye, 0.5, reduction="sum")
    assert float(total) == pytest.approx(3 * float(global_loss(eye, eye, 0.5)))
    images = torch.tensor([0, 0, 1])  # rows 0 and 1 lose one negative each
    two, three = -math.log(math.e**2 / (math.e**2 + 1)), -math.log(math.e**2 / (math.e**2 + 2))
    assert float(global_loss(eye, eye, 0.5, images=images)) == pytest.approx((2 * two + three) / 3)


def test_the_temperature_falls_along_half_a_cosine():
    assert cosine_temperature(0.0) == 0.5
    assert cosine_temperature(0.5) == pytest.approx(0.285)
    assert cosine_temperature(1.0) == pytest.approx(0.07)
    values = [cosine_temperature(i / 10) for i in range(11)]
    assert values == sorted(values, reverse=True)


def test_contexts_are_scaled_by_their_own_width():
    """Doubling the channels by repetition doubles F F^T and its root of D alike to sqrt 2."""
    x = torch.randn(2, 4, 3, generator=rng(0), dtype=torch.float64)
    twice = torch.cat([x, x], -1) / 2**0.25
    assert float(contextual_loss(twice, x)) == pytest.approx(0.0, abs=1e-15)
    assert float(contextual_loss(torch.cat([x, x], -1), x)) > 1e-4


# --- tokens ---------------------------------------------------------------------------------------------------


def test_a_map_is_cut_into_squares():
    x = torch.arange(32.0).reshape(1, 2, 4, 4)
    assert torch.equal(tokens_from_map(x), x.flatten(2).transpose(1, 2))
    squares = tokens_from_map(x, 2)
    assert squares.shape == (1, 4, 8)
    assert torch.equal(squares[0, 1], x[0, :, :2, 2:].flatten())
    for features, patch in ((x, 3), (x.flatten(2), 2), (x[0, 0], 1)):
        with pytest.raises(BadInput, match="patch"):
            tokens_from_map(features, patch)


def test_grids_are_matched_by_averaging():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    coarse = torch.zeros(1, 3, 2, 2)
    ours, theirs = same_grid([x, coarse])
    assert torch.equal(ours, nn.functional.avg_pool2d(x, 2)) and theirs is coarse
    sequence, grid = same_grid([torch.arange(4.0).reshape(1, 4, 1), coarse])  # row by row
    assert torch.equal(sequence[0, 0], torch.tensor([[0.0, 1.0], [2.0, 3.0]])) and grid is coarse
    with pytest.raises(IncompatibleModels, match="square"):
        same_grid([torch.zeros(1, 5, 2), torch.zeros(1, 4, 2)])


def test_places_are_drawn_once_for_both_networks():
    positions = sample_positions(4, 9, 3, generator(0))
    assert all(len(set(row)) == 3 for row in positions.tolist())
    assert len({tuple(row) for row in positions.tolist()}) > 1  # each image has its own
    x = torch.arange(36.0).reshape(4, 9, 1)
    assert torch.equal(take(x, positions).view(4, 3), torch.gather(x[..., 0], 1, positions))
    seen = []
    made = TRG(student_layer="s", teacher_layer="t", tokens_per_image=2, k=K)
    for _ in range(2):
        maps = torch.arange(12.0).reshape(3, 4, 1)
        ours, theirs, count = made._nodes(maps, -maps)
        assert torch.equal(ours, -theirs) and count == 2
        seen.append(ours)
    assert not torch.equal(*seen) and int(made.calls) == 2


def test_leading_tokens_are_left_out():
    x = inputs(0)
    s, t = signals(x)
    rows = torch.cat([torch.full((3, 1, 5), 9.0), x["teacher_map"].flatten(2).transpose(1, 2)], 1)
    plain = run(x)["loss"]
    made = objective(x, teacher_skip=1)
    assert float(made(s, Signal(logits=t.logits, taps={"t": rows}), x)["loss"].detach()) == pytest.approx(
        float(plain)
    )


# --- pitfalls -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_kernel_tunes_itself_to_the_features(scale):
    """Mean edge weight and gradient stay; a fixed sigma loses both."""
    x = inputs(1)
    moved = {**x, "student_map": scale * x["student_map"], "teacher_map": scale * x["teacher_map"]}
    options = {"lam": 0.0, "alpha": 0.0, "gamma": 0.0, "debug": True}
    assert float(run(moved, **options)["edge"]) == pytest.approx(float(run(x, **options)["edge"]))
    assert float(run(moved, **options)["local"]) == pytest.approx(float(run(x, **options)["local"]))
    assert 0.05 < float(run(x, **options)["edge"]) < 0.95
    if scale != 1.0:
        with pytest.raises(BadInput, match="edge weights"):
            run(moved, sigma=1.0, **options)
        assert math.isfinite(float(run(moved, sigma=1.0, **{**options, "debug": False})["loss"]))


def test_distances_far_from_the_origin_keep_their_digits():
    x = 3000.0 + torch.randn(20, 8, generator=rng(0))
    exact = torch.cdist(x.double(), x.double()).square()
    assert torch.allclose(squared_distances(x).double(), exact, atol=1e-3)


@pytest.mark.parametrize("apart", [1e2, 1e4])
def test_neighbours_in_clusters_that_are_far_apart(apart):
    """Distances inside a cluster keep their digits, wherever the clusters are."""
    g = rng(0)
    x = torch.randint(0, 2, (64, 1), generator=g) * apart * torch.ones(1, 8) + 0.1 * torch.randn(
        64, 8, generator=g
    )
    x = x.float().requires_grad_()
    direct = (x.detach()[:, None].double() - x.detach()[None].double()).square().sum(-1)
    assert torch.allclose(squared_distances(x).double(), direct, rtol=1e-5, atol=1e-6)
    a, edges = knn_graph(x, k=4)
    theirs, same = knn_graph(x.detach().double(), k=4)
    near = direct.masked_fill(torch.eye(64, dtype=torch.bool), math.inf).topk(4, largest=False).indices
    expected = torch.zeros_like(edges).scatter(-1, near, True).T
    assert torch.equal(edges, expected) and torch.equal(same, expected)
    assert torch.allclose(a.double(), theirs, atol=1e-4)
    weights = torch.randn(64, 64, generator=g)
    (slope,) = torch.autograd.grad((squared_distances(x) * weights).sum(), x)
    both = (weights + weights.T).double()
    wanted = 2 * (both.sum(1, keepdim=True) * x.double() - both @ x.double()).detach()
    assert torch.allclose(slope.double(), wanted, rtol=1e-4, atol=1e-4 * apart)


def test_half_precision_and_autocast_do_not_reach_the_distances():
    x = torch.randn(20, 8, generator=rng(0)).to(torch.bfloat16)
    expected = torch.cdist(x.double(), x.double()).square()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = squared_distances(x)
        value = global_loss(x, x, 0.07)
    assert found.dtype == torch.float32 and torch.allclose(found.double(), expected, atol=1e-4)
    assert float(value) == pytest.approx(float(global_loss(x.double(), x.double(), 0.07)), rel=1e-5)


def test_equal_tokens_give_finite_slopes():
    x = torch.zeros(6, 4, requires_grad=True)
    a, _ = knn_graph(x, k=2)
    (slope,) = torch.autograd.grad(local_loss(a, torch.zeros(6, 6)), x)
    assert bool(slope.isfinite().all()) and float(a.max()) == 1.0


def test_neighbours_and_width_carry_no_gradient_and_the_teacher_none():
    x = inputs(2)
    for name in ("teacher_map", "teacher"):
        x[name].requires_grad_()
    made = objective(x, tokens_per_image=2)
    found = made(*signals({**x, "student_map": x["student_map"].requires_grad_()}), x)["loss"]
    slopes = torch.autograd.grad(
        found, [x["teacher_map"], x["teacher"], *made.parameters()], allow_unused=True
    )
    assert slopes[0] is None and slopes[1] is None
    assert all(slope is not None and float(slope.abs().sum()) > 0 for slope in slopes[2:])


def test_a_last_short_batch_and_single_nodes_are_refused():
    with pytest.raises(BadInput, match="dataloader_drop_last"):
        knn_graph(torch.randn(8, 2), k=8)
    with pytest.raises(BadInput, match="more images"):
        knn_graph(torch.randn(1, 2), k=1)
    with pytest.raises(BadInput, match="more images"):
        global_loss(torch.randn(1, 2), torch.randn(1, 2), 0.5)


def test_a_single_image_without_negatives_is_refused():
    with pytest.raises(BadInput, match=r"images.*same_image"):
        global_loss(torch.randn(4, 2), torch.randn(4, 2), 0.5, images=torch.zeros(4, dtype=torch.int64))
    x = {name: value[:1] for name, value in inputs(0).items()}
    with pytest.raises(BadInput, match=r"images.*same_image"):
        run(x, same_image=False)
    assert math.isfinite(float(run(x)["loss"])) and math.isfinite(
        float(run(x, same_image=False, gamma=0)["loss"])
    )


def test_skipping_all_tokens_is_refused():
    x = inputs(0)
    s, t = signals(x)
    rows = x["student_map"].flatten(2).transpose(1, 2)
    with pytest.raises(BadInput, match=r"student_skip = 4 .*4 tokens"):
        TRG(student_layer="s", teacher_layer="t", k=K, student_skip=4).setup(
            Signal(logits=s.logits, taps={"s": rows}), t, x
        )
    with pytest.raises(BadInput, match=r"teacher_skip = 9 .*4 tokens"):
        TRG(student_layer="s", teacher_layer="t", k=K, teacher_skip=9).setup(
            s, Signal(logits=t.logits, taps={"t": rows}), x
        )


@pytest.mark.parametrize(
    ("name", "value"),
    [("k", 0), ("patch", 0), ("width", 0), ("tokens_per_image", 0), ("sigma", 0.0), ("temperature", 0.0),
     ("tau_start", -1.0), ("tau_end", math.inf), ("lam", -0.1), ("alpha", -1.0), ("beta", math.nan), ("gamma", -1.0),
     ("student_skip", -1), ("reduction", "none"), ("direction", "both"), ("sigma", "Auto"), ("k", 2.5), ("patch", 1.5),
     ("tokens_per_image", 1.5), ("width", 4.5), ("student_skip", 0.5), ("teacher_skip", True)],
)  # fmt: skip
def test_bad_input(name, value):
    with pytest.raises(BadInput, match=name):
        TRG(**{name: value})


def test_misfits_are_refused_before_training(tmp_path):
    with pytest.raises(IncompatibleModels, match="classes"):
        trainer(tmp_path, teacher=net(1, 8, classes=5))
    assert trainer(tmp_path, teacher=net(1, 8, classes=5), given={"lam": 0.0})
    with pytest.raises(IncompatibleModels, match="student_layer"):
        trainer(tmp_path, given={"student_layer": "layer*"})
    x = inputs(0)
    odd = Signal(logits=x["teacher"], taps={"t": torch.zeros(3, 5, 4)})
    with pytest.raises(IncompatibleModels, match="square"):
        TRG(student_layer="s", teacher_layer="t").setup(signals(x)[0], odd, x)
    texts = Signal(logits=torch.zeros(3, 2, 6), taps={"s": x["student_map"]})
    with pytest.raises(NotApplicable, match="classifier"):
        TRG(student_layer="s", teacher_layer="t").setup(texts, signals(x)[1], x)


# --- the options and the run ----------------------------------------------------------------------------------


def test_weights_and_scales_are_what_they_say():
    x = inputs(3)
    found = run(x)
    parts = {name: float(value) for name, value in found.items()}
    expected = parts["ce"] + parts["kd"] + 4 * parts["inner"] + parts["local"] + 0.1 * parts["global"]
    assert parts["loss"] == pytest.approx(expected)
    bare = run(x, scale_inner=False, reduction="sum")
    expected = parts["ce"] + parts["kd"] + parts["inner"] + 12 * parts["local"] + 1.2 * parts["global"]
    assert float(bare["loss"]) == pytest.approx(expected)
    assert run(x, lam=0, alpha=0, beta=0, gamma=0).keys() == {"loss", "ce"}
    assert float(run(x, same_image=False)["global"]) < parts["global"]


def test_tau_moves_by_updates_and_the_run_resumes(tmp_path):
    """Stopped and continued, a run ends with the same weights, places drawn and tau, bit for bit."""
    options = {"given": {"tokens_per_image": 2}, "save_strategy": "steps", "save_steps": 5}
    whole = trainer(tmp_path / "whole", gradient_accumulation_steps=2, **options)
    whole.train()
    assert float(whole.objective.progress) == 1.0 and int(whole.objective.calls) >= 18
    first = trainer(tmp_path / "parts", gradient_accumulation_steps=2, **options)

    class Stop(Exception):
        pass

    def stop(*_):
        if first.state.global_step == 7:
            raise Stop

    first.objective.register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        first.train()
    second = trainer(tmp_path / "parts", gradient_accumulation_steps=2, **options)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-5"))
    ends = [each.model.state_dict() for each in (whole, second)]
    assert "objective.student_projection.weight" in ends[0]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_an_unknown_length_is_refused():
    with pytest.raises(BadInput, match="max_steps"):
        TRG().on_step({"loss": 1.0}, 1, 0)
