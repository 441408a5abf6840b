"""Training on two processes of one machine, over gloo; this file is also the script that each process runs."""

import argparse
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import test_trainer
import torch
from accelerate.state import DistributedType, PartialState
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from speechkd.arguments import DistillationArguments
from speechkd.blocks import transformer_blocks
from speechkd.checkpoints import last_complete_checkpoint

SETTINGS = {"max_steps": 4, "max_grad_norm": 1.0, "learning_rate": 0.5, "logging_steps": 1}


def run(output_dir: Path, *, processes: int, batch: int, options: tuple[str, ...] = (), check: bool = True):
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    command = [sys.executable, *(launcher if processes > 1 else []), __file__]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    done = subprocess.run(
        [*command, f"--output-dir={output_dir}", f"--batch={batch}", *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    if check and done.returncode:
        raise AssertionError(done.stderr[-4000:])
    return done


def assert_equal_weights(first: Path, second: Path, tolerance: float) -> None:
    ours, theirs = load_file(first / "weights.safetensors"), load_file(second / "weights.safetensors")
    moved = 0.0
    for name, start in load_file(first / "start.safetensors").items():
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
        moved = max(moved, (ours[name] - start).abs().max().item())
    assert moved > 1e-3


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    run(folder, processes=1, batch=8)
    return folder


def test_two_processes_give_the_weights_of_one_for_the_same_global_batch(one_process, tmp_path):
    run(tmp_path, processes=2, batch=4)
    assert_equal_weights(one_process, tmp_path, 1e-6)


def test_sharded_student_and_teacher_give_the_weights_of_one_process(one_process, tmp_path):
    run(tmp_path, processes=2, batch=4, options=("--fsdp",))
    assert_equal_weights(one_process, tmp_path, 1e-5)  # 2e-7 after one step; the shards add up in another order


def test_a_resumed_sharded_run_ends_like_an_uninterrupted_one(tmp_path):
    options = ("--fsdp", "--save-steps=2", "--optim=adamw_torch")
    run(tmp_path / "whole", processes=2, batch=4, options=options)
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "resumed/checkpoint-2")
    run(tmp_path / "resumed", processes=2, batch=4, options=options)
    assert_equal_weights(tmp_path / "whole", tmp_path / "resumed", 0.0)


def test_sigterm_to_one_process_stops_all_of_them_after_the_same_step(tmp_path):
    done = run(tmp_path / "stopped", processes=2, batch=4, options=("--sigterm-in-step=1",), check=False)
    assert "step 2 is saved" in done.stderr or "step 3 is saved" in done.stderr, done.stderr[-3000:]
    assert last_complete_checkpoint(tmp_path / "stopped") is not None
    run(tmp_path / "stopped", processes=2, batch=4)
    run(tmp_path / "whole", processes=2, batch=4)
    assert_equal_weights(tmp_path / "whole", tmp_path / "stopped", 0.0)


def arguments_that_shard(**settings) -> DistillationArguments:
    """accelerate shards on GPUs only; told that these processes have some, it does so over gloo as well."""
    arguments = DistillationArguments(**settings)
    PartialState().distributed_type = DistributedType.MULTI_GPU
    return arguments


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output-dir", type=Path)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--save-steps", type=int)
    parser.add_argument("--optim", default="sgd")
    parser.add_argument("--sigterm-in-step", type=int)
    arguments = parser.parse_args()
    settings = SETTINGS | {"optim": arguments.optim}
    if arguments.fsdp:
        settings |= {
            "fsdp": True,
            "fsdp_config": {
                "fsdp_version": 2,
                "transformer_layer_cls_to_wrap": ["WhisperEncoderLayer", "WhisperDecoderLayer"],
            },
        }
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if arguments.save_steps:
        settings |= {"save_strategy": "steps", "save_steps": arguments.save_steps}
    if world_size > 1:
        settings["use_cpu"] = False  # found out by itself where there is no GPU
    if arguments.fsdp:
        test_trainer.DistillationArguments = arguments_that_shard
    trainer = test_trainer.make_trainer(
        arguments.output_dir, batch=arguments.batch, rank=rank, world_size=world_size, **settings
    )
    start = {name: weight.clone() for name, weight in trainer.model.state_dict().items() if "proj_out" not in name}
    if rank == 1 and arguments.sigterm_in_step is not None:
        terms = trainer.loss_terms

        def terms_with_signal(*inputs):
            if trainer.state.global_step == arguments.sigterm_in_step:
                os.kill(os.getpid(), signal.SIGTERM)
            return terms(*inputs)

        trainer.loss_terms = terms_with_signal
    trainer.train(resume_from_checkpoint=True)
    if arguments.fsdp:
        for model in (trainer.model, trainer.teacher):
            blocks = transformer_blocks(model)
            assert blocks and all(isinstance(weight, DTensor) for block in blocks for weight in block.parameters())
    weights = trainer.accelerator.get_state_dict(trainer.model)
    if rank == 0:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        save_file(start, arguments.output_dir / "start.safetensors")
        save_file({name: weights[name].contiguous() for name in start}, arguments.output_dir / "weights.safetensors")


if __name__ == "__main__":
    main()
    if torch.distributed.is_initialized():
        # gloo aborts a process that ends while another still talks to it, and at times while its own threads end
        torch.distributed.barrier()
        sys.stderr.flush()
        os._exit(0)
