"""After the weights are written: the other files, the checks, the report, the publication."""

from __future__ import annotations

import json
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from peftcli import __version__
from peftcli.errors import ResourceError
from peftcli.estimate.merging import comparing_bytes
from peftcli.fingerprint import fingerprint
from peftcli.machine import free_host_memory
from peftcli.merge.bring import bring_files, complete_stops, write_config
from peftcli.merge.card import model_card
from peftcli.merge.compute import Rounding
from peftcli.merge.identity import adapter_digest
from peftcli.merge.modelfile import write_modelfile
from peftcli.merge.options import DENSITY, MergeOptions
from peftcli.merge.prepare import Prepared
from peftcli.merge.proof import prove
from peftcli.merge.result import MergeResult, Precision, Proof, Verification
from peftcli.merge.source import MERGE_REPORT
from peftcli.run_dir import publish_folder

Tell = Callable[[str], None]
LOGITS = 1 << 26  # how many reference logits are held
OPERATIONS = 4e12  # of one forward pass on a CPU: about a minute
LOST_SHARE = 0.1  # of the update, from which another dtype is proposed


def finish(
    prepared: Prepared,
    options: MergeOptions,
    staging: Path,
    output: Path,
    rounding: Rounding,
    started: float,
    tell: Tell,
) -> MergeResult:
    """Complete, check and publish the merged folder; raises NumericalError when a check fails."""
    adapter = prepared.adapters[0].source
    write_config(prepared.config, prepared.base, prepared.plan, prepared.save_dtype, staging)
    bring_files(prepared.base, adapter, staging)
    tokenizer = _tokenizer(staging)
    stops = complete_stops(staging, _end_of_text(tokenizer))
    proof = None if options.verify is False else _prove(prepared, staging, tell)
    checked, not_checked = _verification(prepared, options, staging, tell)
    exported = _export(options, staging, stops)
    result = _result(
        prepared, options, output, rounding, proof, checked, not_checked, exported, started
    )
    result = replace(result, warnings=(*result.warnings, *_too_many_tokens(tokenizer, prepared)))
    (staging / "README.md").write_text(model_card(result, prepared.base, adapter), encoding="utf-8")
    report = result.to_dict() | {
        "peftcli": __version__,
        "adapter_sha256": [adapter_digest(a.source.folder) for a in prepared.adapters],
        "fingerprint": vars(fingerprint(staging)),
    }
    text = json.dumps(report, indent=2, ensure_ascii=False, default=str) + "\n"
    (staging / MERGE_REPORT).write_text(text, encoding="utf-8")
    (staging / ".lock").unlink(missing_ok=True)
    publish_folder(staging, output)
    return result


def _prove(prepared: Prepared, staging: Path, tell: Tell) -> Proof:
    tell("reading the written weights again")
    proof = prove(prepared.plan, staging)
    if proof.unchanged_updates:
        tell(
            f"warning: rounding lost the whole update of {len(proof.unchanged_updates)} tensors, "
            f"such as {proof.unchanged_updates[0]}"
        )
    return proof


def _verification(
    prepared: Prepared, options: MergeOptions, staging: Path, tell: Tell
) -> tuple[Verification | None, str | None]:
    """The comparison of logits, or why there is none."""
    reason = _why_not(prepared, options)
    if reason is not None:
        return None, reason
    # Preparing rows imports `datasets`, which a merge without this check does not need.
    from peftcli.merge.prompts import prompts_for
    from peftcli.merge.verify import Subject, verify

    vocabulary = _vocabulary(prepared)
    prompts = prompts_for(prepared.adapters[0].source.recipe(), staging, vocabulary)
    most = LOGITS // vocabulary
    if options.device == "cpu":
        most = min(most, int(OPERATIONS / (2 * prepared.parameters)))
    subject = Subject(
        merged=staging,
        base=prepared.base,
        adapters=prepared.adapters,
        weights=prepared.weights,
        quantization=prepared.quantization,
        dequantized=prepared.used.kind == "dequantized",
        save_dtype=_narrowest(prepared),
        device=prepared.arithmetic.device,
        routed=prepared.routed,
        pickle=not any(prepared.base.folder.glob("*.safetensors")),
    )
    return verify(subject, prompts.cut(max(len(prompts.ids) * 2, most)), tell), None


def _why_not(prepared: Prepared, options: MergeOptions) -> str | None:
    if options.verify is False:
        return "--no-verify"
    if options.combine != "linear":
        return f"nothing serves {options.combine} unmerged, so there is nothing to compare with"
    kinds = {adapter.source.config["peft_type"] for adapter in prepared.adapters}
    if len(prepared.adapters) > 1 and kinds != {"LORA"}:
        return "PEFT does not serve several adapters of these kinds at once"
    if prepared.weights[0] != 1 and kinds != {"LORA"}:
        return "PEFT has no weight for adapters of this kind"
    needed = comparing_bytes(prepared.parameters)
    free = free_memory(prepared.arithmetic.device)
    if needed <= free:
        return None
    text = f"it needs about {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} GiB are free"
    if options.verify:
        raise ResourceError(f"--verify: {text}", "use a larger machine, or --no-verify")
    return text


def free_memory(device: torch.device) -> int:
    """Bytes that can be used on the device: of the GPU, or of the machine and its limits."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_host_memory()


def _narrowest(prepared: Prepared) -> torch.dtype:
    """The dtype of most of the changed weights."""
    sizes: Counter[torch.dtype] = Counter()
    for item in prepared.plan.items:
        if len(item.shape) > 1:
            sizes[item.dtype] += item.bytes // item.dtype.itemsize
    return sizes.most_common(1)[0][0]


def _vocabulary(prepared: Prepared) -> int:
    """How many tokens both the merged model and base + adapter know."""
    counts = [adapter.vocabulary for adapter in prepared.adapters if adapter.vocabulary]
    return min([*counts, prepared.vocabulary]) if not prepared.plan.vocabulary else min(counts)


def _tokenizer(staging: Path) -> PreTrainedTokenizerBase | None:
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(staging), trust_remote_code=False
        )
    except (OSError, ValueError, KeyError):
        return None
    return found


def _end_of_text(tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    token = tokenizer.eos_token_id if tokenizer is not None else None
    return token if isinstance(token, int) else None


def _too_many_tokens(
    tokenizer: PreTrainedTokenizerBase | None, prepared: Prepared
) -> Iterator[str]:
    """Tokens that were added while the embedding was not resized, or not saved with the adapter."""
    rows = prepared.plan.vocabulary[1] if prepared.plan.vocabulary else prepared.vocabulary
    if tokenizer is not None and len(tokenizer) > rows:
        yield (
            f"the tokenizer knows {len(tokenizer)} tokens and the embedding has {rows} rows: text "
            "with the others fails; use the tokenizer of the base, or save the adapter with its "
            "grown embedding"
        )


def _export(options: MergeOptions, staging: Path, stops: list[int]) -> tuple[str, ...]:
    if options.export != "ollama":
        return ()
    return ("Modelfile", *write_modelfile(staging, stops))


def _result(
    prepared: Prepared,
    options: MergeOptions,
    output: Path,
    rounding: Rounding,
    proof: Proof | None,
    checked: Verification | None,
    not_checked: str | None,
    exported: tuple[str, ...],
    started: float,
) -> MergeResult:
    items = prepared.plan.items
    precision = Precision(rounding.touched, rounding.unchanged, rounding.relative_error)
    dtypes = Counter(str(item.dtype).removeprefix("torch.") for item in items)
    named = [adapter.source.name for adapter in prepared.adapters]
    return MergeResult(
        output=output,
        base=prepared.used,
        adapters=tuple(zip(named, prepared.weights, strict=True)),
        method=prepared.adapters[0].method,
        combine=options.combine if len(named) > 1 else None,
        density=(options.density or DENSITY) if options.combine != "linear" else None,
        arithmetic="float32" if options.fp32 else "the base's dtype",
        dtypes=dict(dtypes),
        tensors=len(items),
        tensors_changed=sum(bool(item.updates or item.dequantized) for item in items),
        tensors_added=tuple(item.name for item in items if item.added),
        untied=prepared.plan.untied,
        vocabulary=prepared.plan.vocabulary,
        bytes=prepared.plan.bytes,
        seconds=time.monotonic() - started,
        peak_memory_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        precision=precision,
        proof=proof,
        verification=checked,
        not_verified=not_checked,
        exported=exported,
        warnings=(*prepared.warnings, *_warnings(precision)),
    )


def _warnings(precision: Precision) -> list[str]:
    if precision.touched == 0:
        return ["the adapter changes nothing: every update is zero"]
    if precision.lost_share < LOST_SHARE:
        return []
    return [
        f"{precision.lost_share:.0%} of the weights with an update kept their value, because the "
        "update is finer than the saved dtype; --save-dtype float32 keeps all of it"
    ]
