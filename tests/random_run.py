"""A finished train run without training: a model with random weights, whose learned maps are not 0."""

import torch

from raygr import runs
from raygr.models.workers import Share
from raygr.train.config import TrainConfig
from raygr.train.inputs import load_inputs
from raygr.train.outputs import write_outputs
from raygr.train.state import start_training


def random_run(config: TrainConfig, *, noise_seed: int = 1) -> str:
    """Writes the run of these settings; the prepare run and the scores must be there."""
    run = runs.start_run(config.output, job="train", config=config)
    training = start_training(config, load_inputs(config), torch.device("cpu"), Share())
    generator = torch.Generator()
    with torch.no_grad():
        for parameter in training.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator.manual_seed(noise_seed)) * 0.3)
    training.best_weights = dict(training.model.state_dict())
    training.progress.lines.append({"seconds": 1.0})
    write_outputs(training)
    runs.finish_run(run, inputs=[config.data], counts={})
    return run.path
