"""Models at work as other tools see them, inside `plain` and outside; their copies and files."""

import copy
import warnings

import pytest
import torch
from conftest import random_batches, train_epoch
from fvcore.nn import FlopCountAnalysis
from test_frozen_models import some
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import remove_parametrizations
from torch.utils.flop_counter import FlopCounterMode

import neq
from neq import compiled

INPUTS = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
    )


def at_work(whole, model=None):
    """A model with rows 0-3 of its first layer frozen, or all of them and the last layer's."""
    model = build() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    freezer = neq.NeuronFreezer(model, optimizer, neq.Everyone())
    mask = torch.zeros_like(freezer.frozen)
    mask[:4] = True
    if whole:
        mask[:8] = mask[-4:] = True
    freezer.freeze(mask)
    return model, freezer, optimizer


def looks(model):
    """What tools look at: classes, attributes, and hooks in order."""
    return [
        (type(m), sorted(vars(m)), [list(t.values()) for n, t in vars(m).items() if "hooks" in n])
        for m in model.modules()
    ]


def gradients(model):
    model.zero_grad()
    model(INPUTS).square().sum().backward()
    return [p.grad for p in model.parameters()]


def nodes(model):
    return [(node.op, str(node.target)) for node in torch.fx.symbolic_trace(model).graph.nodes]


def products(model):
    counts = FlopCountAnalysis(model, INPUTS)
    counts.unsupported_ops_warnings(False)
    return counts.by_module()


def counted(model):
    with FlopCounterMode(display=False) as counter:
        model(INPUTS).sum().backward()
    return counter.get_total_flops()


def profiled(model):
    with torch.profiler.profile(with_flops=True) as profile:
        model(INPUTS)
    return sorted((e.key, e.count, e.flops) for e in profile.key_averages() if "aten" in e.key)


def quantised(model):
    model = copy.deepcopy(model)
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8, inplace=True)
    return model(INPUTS)


# Each a function of a model: what a tool makes of it.
TOOLS = {
    "types": lambda model: [type(m) for m in model.modules()],
    "output": lambda model: model(INPUTS),
    "gradients": gradients,
    "script": lambda model: torch.jit.script(model)(INPUTS),
    "trace": lambda model: torch.jit.trace(model, INPUTS)(INPUTS),
    "export": lambda model: torch.export.export(model, (INPUTS,)).module()(INPUTS),
    "export strict": lambda model: torch.export.export(model, (INPUTS,), strict=True).module()(
        INPUTS
    ),
    "fx": nodes,
    "fvcore": products,
    "flop counter": counted,
    "profiler": profiled,
    "quantisation": quantised,
    "fusion": lambda model: fuse_conv_bn_eval(model[0], model[1])(INPUTS),
}


def made(tool, model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.jit and torch.ao are going
        return TOOLS[tool](model.eval())


def assert_same(found, expected):
    assert type(found) is type(expected)
    if isinstance(found, (torch.Tensor, list)) and not isinstance(found[0], (tuple, type)):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    else:
        assert found == expected


@pytest.mark.parametrize("tool", TOOLS)
def test_tools_find_the_plain_model_inside(tool):
    model, freezer, _ = at_work(True)
    with freezer.plain():
        found = made(tool, model)
    assert_same(found, made(tool, build()))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("tool", ["output", "trace", "export", "fvcore"])
def test_these_are_right_outside_as_well(tool, whole):
    model, _, _ = at_work(whole)
    assert_same(made(tool, model), made(tool, build()))


def test_fx_makes_a_node_of_each_layer_outside_as_well():
    model, _, _ = at_work(False)
    model.eval()
    graph = torch.fx.symbolic_trace(model)
    layers = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert layers == ["0", "1", "2", "3", "4"]
    assert torch.equal(graph(INPUTS), model(INPUTS))
    for layer in (model[0], model[4]):  # of a layer by itself, its operation
        assert "call_function" in [op for op, _ in nodes(layer)]


def test_script_says_what_to_do():
    model, _, _ = at_work(False)
    with pytest.raises(RuntimeError, match=r"inside `with freezer\.plain\(\):`"):
        made("script", model)
    assert_same(made("output", model), made("output", build()))


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_everything_is_as_before(fails):
    model, freezer, optimizer = at_work(True)
    before, plan = looks(model), dict(freezer.plan)
    works = [vars(model[i])[name] for i in (0, 4) for name in ("_neq_work", "_neq_traced")]
    fresh = looks(build())
    try:
        with freezer.plain():
            assert looks(model) == fresh
            with freezer.plain():
                assert looks(model) == fresh
            assert looks(model) == fresh
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert looks(model) == before
    assert freezer.plan == plan
    found = [vars(model[i])[name] for i in (0, 4) for name in ("_neq_work", "_neq_traced")]
    assert all(ours is theirs for ours, theirs in zip(found, works, strict=True))
    kept = [p.clone() for p in model[0].parameters()]
    train_epoch(model, optimizer, random_batches())
    assert all(torch.equal(p, k) for p, k in zip(model[0].parameters(), kept, strict=True))


def test_frozen_rows_stand_still_after_a_backward_inside():
    model, freezer, optimizer = at_work(False)
    other = neq.NeuronFreezer(model, optimizer, neq.Everyone())  # another one clears nothing either
    other.freeze(freezer.frozen)
    model.eval()
    before = [p.clone() for p in model[0].parameters()]
    gradients(model)
    optimizer.step()
    with freezer.plain():
        found = gradients(model)
        assert all((gradient[:4] != 0).any() for gradient in found[:2])
        optimizer.step()
    assert (model[0].weight.grad[:4] == 0).all()
    for parameter, kept in zip(model[0].parameters(), before, strict=True):
        assert torch.equal(parameter[:4], kept[:4])
        assert (parameter[4:] != kept[4:]).any()


@pytest.mark.parametrize("call", ["update", "freeze", "load_state_dict", "remove", "make"])
def test_nothing_changes_inside(call):
    model, freezer, optimizer = at_work(True)
    frozen, plan, state = freezer.frozen, dict(freezer.plan), freezer.state_dict()
    mask = ~frozen
    calls = {
        "update": freezer.update,
        "freeze": lambda: freezer.freeze(mask),
        "load_state_dict": lambda: freezer.load_state_dict(state),
        "remove": freezer.remove,
        "make": lambda: neq.NeuronFreezer(model, optimizer),
    }
    with freezer.plain():
        with pytest.raises(RuntimeError, match="after that block"):
            calls[call]()
        assert looks(model) == looks(build())
    assert torch.equal(freezer.frozen, frozen)
    assert freezer.epoch == 0
    assert freezer.plan == plan
    freezer.update()
    freezer.remove()
    assert looks(model) == looks(build())


@pytest.fixture
def graphs():
    """How many graphs dynamo has compiled; one too many for it is an error."""
    torch._dynamo.reset()
    compiled._functions.clear()
    counters.clear()
    limit = torch._dynamo.config.recompile_limit
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=limit):
        yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_code_stays_as_it_is(net, graphs):
    call = torch.compile(net, backend="eager")
    freezer = neq.NeuronFreezer(call, torch.optim.SGD(net.parameters(), lr=0.1), neq.Everyone())
    freezer.freeze(some(net))
    call(INPUTS).sum().backward()
    known = graphs()
    with freezer.plain():
        call.eval()
        assert torch.equal(call(INPUTS), net(INPUTS))
    call.train()
    assert graphs() == known + 1
    net.zero_grad()
    call(INPUTS).sum().backward()
    assert graphs() == known + 1
    frozen = freezer.frozen[freezer.neurons["conv"]]
    assert (net.conv.weight.grad[frozen] == 0).all()


@pytest.mark.slow
def test_graphs_of_the_plain_model_have_room(graphs, monkeypatch):
    monkeypatch.setattr(compiled, "GRAPHS", 3)
    torch._dynamo.config.recompile_limit = 4  # until the fixture's patch ends
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    call = torch.compile(net, backend="eager")
    freezer = neq.NeuronFreezer(call, torch.optim.SGD(net.parameters(), lr=0.1), neq.Everyone())
    inputs = torch.randn(3, 2)
    for whole in range(5):
        freezer.freeze(freezer.neurons.select(str(layer) for layer in range(whole)))
        call(inputs).sum().backward()
        with torch.no_grad():
            call(inputs)
            with freezer.plain():
                call(inputs)
    assert graphs() > 5 + 2  # those of the evaluations have been compiled anew


def test_hooks_of_others_keep_their_places():
    model, freezer, _ = at_work(True)
    called = []

    def hooked(name, **how):
        return model.register_forward_hook(lambda *_: called.append(name), **how)

    first, last = hooked("first", prepend=True), hooked("last")
    with freezer.plain():
        hooked("new")
        hooked("newest", prepend=True)
        last.remove()
        order = [type(hook).__name__ for hook in model._forward_hooks.values()]
        assert order == ["function"] * 3
    order = [type(hook).__name__ for hook in model._forward_hooks.values()]
    assert order == ["function", "function", "_Tie", "function"]
    model(INPUTS).sum().backward()
    assert called == ["newest", "first", "new"]
    first.remove()
    called.clear()
    copy.deepcopy(model)(INPUTS)
    assert called == ["newest", "new"]


def test_a_state_that_is_loaded_inside_is_no_move_of_frozen_rows():
    model, freezer, _ = at_work(False)
    state = copy.deepcopy(model.state_dict())
    state["0.weight"][0] += 1
    with freezer.plain():
        model.load_state_dict(state)
    freezer.update()
    freezer.freeze(torch.ones_like(freezer.frozen))
    with freezer.plain():
        model(INPUTS)
    with torch.no_grad():
        model[0].weight[0] += 1
    with pytest.raises(ValueError, match="0"):
        freezer.update()


def test_what_is_parametrised_inside_stays_so():
    model, freezer, _ = at_work(False)
    with freezer.plain():
        weight_norm(model[0])
    assert type(model[0]).__bases__ == (nn.Conv2d,)
    model(INPUTS).sum().backward()


def test_a_parametrised_layer_is_let_go_of():
    model, freezer, _ = at_work(False)
    model.eval()
    weight_norm(model[0])
    twin = copy.deepcopy(copy.deepcopy(model))
    assert "neq" not in str([type(m).__mro__ for m in twin.modules()])
    assert all((gradient != 0).any(0).all() for gradient in gradients(twin)[1:3])
    with freezer.plain():
        assert "neq" not in str(type(model[0]).__mro__)
    freezer.remove()
    assert torch.equal(model(INPUTS), twin(INPUTS))
    remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.Conv2d
