import torch

from harness.methods import Method


class Shrink(Method):
    """Weights with a small gradient shrink after each step; the best ones are kept."""

    def __init__(self, training, lam):
        super().__init__(training)
        self.lam, self.best_loss, self.steps = lam, float("inf"), 0

    def after_backward(self):
        self.gradients = [p.grad.clone() for p in self.training.model.parameters()]

    @torch.no_grad()
    def after_step(self):
        self.steps += 1
        for p, gradient in zip(self.training.model.parameters(), self.gradients, strict=True):
            p.sub_(self.lam * p * (1 - gradient.abs()).clamp(min=0))

    def end_epoch(self, epoch):
        if (loss := self.training.evaluate("validation")) < self.best_loss:
            self.best_loss = loss
            self.training.best.keep()
        elif epoch % 2:
            self.training.best.bring_back()

    def flops(self, usual):
        return {"overhead": usual["overhead"] + 1}

    def measures(self):
        return {"best_loss": self.best_loss, "steps": self.steps}

    def state_dict(self):
        return {"best_loss": self.best_loss, "steps": self.steps}

    def load_state_dict(self, state):
        self.best_loss, self.steps = state["best_loss"], state["steps"]
