"""The public names and signatures of ``sift_train`` are fixed; update this test to change them."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import sift_train

NAMES = (
    "RULES SIFT Evaluation FitConfig FitResult MemoryReport Plan PublishCallback Reselection Rule SiftCallback "
    "SiftConfig SiftTrainerMixin SparseParameter StepReport export_delta fit from_pretrained "
    "get_sift_model grouped_parameters intersect load_mask load_sharded mask_of_delta plan principal save_mask save_sharded unite"
).split()


@pytest.mark.parametrize("package", ["torch", "transformers", "accelerate", "safetensors"])
def test_a_missing_package_is_named_with_the_extra(package: str) -> None:
    code = f"import sys; sys.modules['{package}'] = None; import sift_train"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == (
        f"ModuleNotFoundError: sift_train needs {package}, which is not installed; install it with:"
        " pip install 'sparsedelta[train]'"
    )


def test_all_missing_packages_are_named_at_once() -> None:
    hide = "import sys; sys.modules |= dict.fromkeys(('torch', 'accelerate')); "
    for code, message in (
        ("import sift_train", "sift_train needs torch, accelerate, which are not installed; install them with:"),
        (
            "from sparsedelta.live.bits import check_installed; check_installed('torch', 'nothing')",
            "models in memory need torch and nothing, which are not installed; install them with:",
        ),
    ):  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", hide + code], capture_output=True, text=True, check=False
        )
        last = done.stderr.splitlines()[-1]
        assert last.startswith(f"ModuleNotFoundError: {message} pip install 'sparsedelta[train]'")
    assert last.endswith(" nothing")


def test_names() -> None:
    assert sorted(sift_train.__all__) == sorted(NAMES)
    for name in NAMES:
        assert getattr(sift_train, name) is not None
    with pytest.raises(AttributeError, match="module 'sift_train' has no attribute 'train'"):
        sift_train.train  # noqa: B018


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        (
            "SIFT",
            "model sparse_rate sparse_module exception grad_acc gradient_checkpointing "
            "* selection budget block seed process_group reduce_dtype lr_transfer masters masters_device",
        ),
        (
            "fit",
            "model data * output config loss base base_id save_target overwrite evaluate on_step "
            "on_evaluation progress run_dir resume",
        ),
        ("export_delta", "model output * sift base base_id info save_target overwrite"),
        (
            "plan",
            "model sparse_rate * sparse_module exception dtype optimizer devices sharded masters masters_device",
        ),
        ("save_sharded", "sift folder optimizer"),
        ("load_sharded", "sift folder optimizer"),
        (
            "SiftConfig",
            "* sparse_rate sparse_module exception selection selection_batches budget block reselection "
            "gradient_checkpointing seed lr_transfer masters masters_device",
        ),
        ("grouped_parameters", "sift weight_decay * decay_to"),
        ("principal", "rank"),
        ("get_sift_model", "model config * grad_acc"),
        ("from_pretrained", "name * base model_class dtype device_map"),
        ("save_mask", "sift path * overwrite"),
        ("load_mask", "path"),
        ("mask_of_delta", "delta model"),
        (
            "FitConfig",
            "* sparse_rate sparse_module exception selection selection_batches budget block reselection optimizer lr "
            "lr_transfer masters masters_device weight_decay decay_to betas eps momentum schedule warmup epochs max_steps accumulation "
            "max_grad_norm mixed_precision gradient_checkpointing log_every eval_every eval_before patience "
            "higher_is_better save_every publish publish_every trackers reduce_dtype seed",
        ),
    ],
)
def test_parameters(name: str, parameters: str) -> None:
    found: list[str] = []
    for parameter in inspect.signature(getattr(sift_train, name)).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in found:
            found.append("*")
        found.append(parameter.name)
    assert " ".join(found) == parameters


def test_what_a_sift_offers() -> None:
    offered = {name for name in dir(sift_train.SIFT) if not name.startswith("_")}
    assert offered == {
        "after_closure", "after_step", "attach", "before_step", "before_use", "check_parameters", "check_ranks", "check_reselecting", "clip_grad_norm_", "close",
        "finish_selection", "first_config", "get_trainable_num", "grad_acc", "load", "load_state_dict", "lr_share", "masters_device", "measuring_share",
        "memory_report", "n_reselections", "n_total", "n_trained", "named_parameters_in_optimizer",
        "named_trainable_parameters", "parameters_in_optimizer", "print_trainable_parameters",
        "is_closed", "of", "ranks", "record", "reshard", "set_trainer", "push_to_hub", "reselecting", "revert", "reverted", "save", "selecting", "sparse_lr", "state_dict", "sync_gradients",
        "trainable_parameters",
        "write_back", "zero_grad",
    }  # fmt: skip
