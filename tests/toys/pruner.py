import torch

from harness.methods import Method


class Pruner(Method):
    """At the end of epoch `at` the rows with the smallest norm become zero, and stay so."""

    size = property(lambda self: sum(int(p.count_nonzero()) for p in self.model.parameters()))

    def __init__(self, training, share, at):
        super().__init__(training)
        self.model, self.share, self.at, self.kept = training.model, share, at, {}

    def weights(self):
        modules = self.model.named_modules()
        return {name: m.weight for name, m in modules if isinstance(m, torch.nn.Conv2d)}

    @torch.no_grad()
    def after_step(self):
        for name, kept in self.kept.items():
            self.weights()[name].mul_(kept.to(self.weights()[name].device))

    def end_epoch(self, epoch):
        if epoch == self.at:
            for name, weight in self.weights().items():
                norms = weight.detach().flatten(1).norm(dim=1)
                self.kept[name] = (norms > norms.quantile(self.share)).float().view(-1, 1, 1, 1)
            self.after_step()

    def measures(self):
        zeros = {n: float((w.flatten(1) == 0).all(1).sum()) for n, w in self.weights().items()}
        return {"zero_rows": sum(zeros.values())} | {("zero_rows", n): z for n, z in zeros.items()}

    def state_dict(self):
        return {"kept": dict(self.kept)}

    def load_state_dict(self, state):
        self.kept = dict(state["kept"])
