"""`--input` with names and dtypes: what a bare model of tokens is counted and timed on."""

import json

import pytest
import torch
from token_models import Encoder, Heads
from torch import nn

from harness.errors import UserError
from harness.flops.inputs import Input, Inputs, parse_inputs
from harness.flops.subject import costs_of

TOKENS = "input_ids:int64:7,attention_mask:int64:7"


@pytest.mark.parametrize(
    "text, parts",
    [
        ("3x224x224", [Input(shape=(3, 224, 224))]),
        ("7", [Input(shape=(7,))]),
        ("int64:7", [Input(shape=(7,), dtype=torch.int64)]),
        ("x:7", [Input(shape=(7,), name="x")]),
        ("x:bool:7x2", [Input(shape=(7, 2), dtype=torch.bool, name="x")]),
        ("3x4,5", [Input(shape=(3, 4)), Input(shape=(5,))]),
        (
            "ids:int32:7,attention_mask:9",
            [
                Input(shape=(7,), dtype=torch.int32, name="ids"),
                Input(shape=(9,), name="attention_mask"),
            ],
        ),
    ],
)
def test_inputs_are_read_and_written(text, parts):
    found = parse_inputs(text)
    assert found == Inputs(tuple(parts))
    assert str(found) == text
    assert parse_inputs(f" {text.replace(',', ' , ')} ") == found


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "give one sample's shape, such as 3x224x224, or input_ids:int64:128,attention"),
        ("", "give one sample's shape"),
        ("3x0", "give one sample's shape"),
        ("3,", "give one sample's shape"),
        ("ids:int64:x", "give one sample's shape"),
        ("ids=int64", "give one sample's shape"),
        ("ids:int16:7", "'int16' is no dtype here; it is float32, int64, int32 or bool"),
        ("float64:7", "'float64' is no dtype here"),
        ("long:7", "'long' is no dtype here"),
        ("in put:int64:7", "'in put' is no name of an argument"),
        ("a:b:int64:7", "each is NAME:DTYPE:SHAPE"),
        ("a:7,a:int64:7", "a is given twice"),
    ],
)
def test_wrong_inputs_are_one_line(text, message):
    with pytest.raises(UserError) as raised:
        parse_inputs(text)
    assert message in str(raised.value)
    assert str(raised.value).startswith(f"--input {text or ''}")
    assert "\n" not in str(raised.value)


def test_masks_leave_nothing_out_and_ids_are_of_any_vocabulary():
    made = parse_inputs(
        "input_ids:int64:5,attention_mask:int64:5,mask:5,flags:bool:5,key_padding_mask:bool:5,"
        "src_key_padding_mask:5,x:5"
    )
    random, zeros = made.random(3), made.zeros(3)
    assert random.args == ()
    for name, value in (
        ("input_ids", 0),
        ("attention_mask", 1),
        ("mask", 1),
        ("flags", True),
        ("key_padding_mask", False),
        ("src_key_padding_mask", 0),
    ):
        for found in (random, zeros):
            assert found.kwargs[name].shape == (3, 5)
            assert (found.kwargs[name] == value).all()
    assert random.kwargs["input_ids"].dtype == torch.int64
    assert random.kwargs["x"].unique().numel() == 15
    assert not zeros.kwargs["x"].any()


def test_a_model_of_tokens_by_hand():
    linear = 4 * 7 * 8 * 8 + 2 * 7 * 8 * 16  # three projections and the convolution; up, down
    forward = 2 * (linear + 8 * 3 + 2 * 7 * 7 * 8)
    costs = costs_of(Encoder(), parse_inputs(TOKENS))
    assert (costs.forward(), costs.evaluation()) == (forward, forward)
    nothing = torch.zeros(len(costs.neurons), dtype=torch.bool)
    assert costs.backward(nothing).dense == 2 * forward  # the embedding trains, too
    heads = costs_of(Heads(), parse_inputs("3x6x6,5"))
    assert heads.forward() == 2 * (4 * 4 * 4 * 27 + 5 * 4 + 4 * 2)


@pytest.mark.parametrize(
    "what",
    [
        ("token_models:Encoder", TOKENS),
        ("token_models:Encoder", "int64:7,bool:7"),
        ("token_models:Padded", "src:7x8,src_key_padding_mask:bool:7"),
        ("token_models:Heads", "vector:5,image:3x6x6"),
    ],
)
def test_counted_is_executed(neqbench, what):
    model, inputs = what
    for frozen in (0, 0.5, 1):
        words = ["--model", model, "--input", inputs, "--frozen", frozen, "--verify"]
        done = neqbench("flops", *words, "--format", "json")
        found = json.loads(done.stdout)["verify"]
        assert (done.returncode, found["counted"]) == (0, found["measured"])
        assert found["counted"] > 0 or frozen == 1


@pytest.mark.slow
def test_counted_is_executed_compiled(neqbench):
    words = ["--model", "token_models:Encoder", "--input", TOKENS, "--frozen", "0.5"]
    done = neqbench("flops", *words, "--verify", "--compile", "--format", "json")
    found = json.loads(done.stdout)["verify"]
    assert (done.returncode, found["counted"]) == (0, found["measured"])


@pytest.mark.parametrize("command", ["flops", "speed"])
@pytest.mark.parametrize(
    "model, inputs, message",
    [
        ("token_models:Encoder", "7", "token ids are integers: --input input_ids:int64:128"),
        ("token_models:Encoder", "ids:int64:7", "argument 'ids'); name its arguments: --input"),
        ("token_models:Heads", "3x6x6", "argument: 'vector'); name its arguments: --input"),
        ("token_models:Encoder", "ids:int8:7", "'int8' is no dtype here"),
    ],
)
def test_what_a_model_can_not_be_called_with_is_one_line(neqbench, command, model, inputs, message):
    done = neqbench(command, "--model", model, "--input", inputs)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_steps_are_timed_on_tokens(neqbench, monkeypatch):
    monkeypatch.setattr("neq.timings.SECONDS", 0.0)
    words = ["--model", "token_models:Encoder", "--input", TOKENS, "--frozen", "1"]
    done = neqbench("speed", *words, "--batch", "2", "--seconds", "0", "--format", "json")
    assert done.returncode == 0
    rows = json.loads(done.stdout)["rows"]
    counted = json.loads(neqbench("flops", *words, "--format", "json").stdout)["backward"]
    for row in rows:
        assert row["step_ratio"] > 0
        if (row["granularity"], row["gradient"]) == ("neuron", "exact"):
            assert row["required_ratio"] == pytest.approx(counted["required"] / counted["dense"])


class Scripted(nn.Module):
    """Looks its tokens up in a matrix, and says so in its own way."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.ones(9, 4))
        self.linear = nn.Linear(4, 2)

    def forward(self, ids):
        return self.linear(self.table[ids])


def test_floats_where_indices_are_wanted_are_told_of_token_ids():
    with pytest.raises(UserError, match="token ids are integers: --input input_ids:int64:128"):
        costs_of(Scripted(), parse_inputs("7"))
    assert costs_of(Scripted(), parse_inputs("ids:int64:7")).forward() == 2 * 7 * 4 * 2
