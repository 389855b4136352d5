"""On a GPU: Lightning and the Trainer in half precision, proof, and counts of what lies there."""

import pytest
import torch
from conftest import random_batches
from torch import nn

import neq
from harness import count_flops, verify

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # of other packages
]


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_lightning(precision):
    fit = pytest.importorskip("lightning_fit")
    net, callback, proofs = fit.Net(), fit.freezing(), []

    class Proves(fit.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            if trainer.current_epoch > 2 and not index:
                proofs.append(verify(callback.freezer, batch, loss))

    trainer = fit.quiet(callback, Proves(), precision=precision, accelerator="gpu")
    trainer.fit(net, *fit.loaders())
    assert callback.freezer.frozen.any()
    assert proofs
    assert all(proof.measured == proof.counted < proof.dense for proof in proofs)


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_the_trainer(tmp_path, precision):
    fit = pytest.importorskip("trainer_fit")
    options = {"use_cpu": False, "bf16": precision == "bf16", "fp16": precision == "fp16"}
    whole, callback = fit.trained(tmp_path / "whole", **options)
    assert callback.freezer.frozen.any()
    checkpoint = tmp_path / "whole" / "checkpoint-12"
    resumed, again = fit.trained(tmp_path / "resumed", resume=checkpoint, **options)
    assert torch.equal(callback.freezer.frozen, again.freezer.frozen)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


def test_proof_and_count(net):
    example = torch.randn(4, 3, 6, 6)
    expected = count_flops(net, example)
    model = net.cuda()
    freezer = neq.NeuronFreezer(model, torch.optim.AdamW(model.parameters()), neq.Everyone())
    (inputs, labels), *_ = random_batches(1)
    for share in (0.0, 0.7, 1.0):
        freezer.freeze(torch.rand(len(freezer.neurons)) < share)
        for enabled in (False, True):
            with torch.autocast("cuda", torch.bfloat16, enabled=enabled):
                proof = verify(freezer, (inputs, labels), loss)
            assert proof.counted == proof.measured
    assert count_flops(model, example.cuda()).backward == expected.backward
