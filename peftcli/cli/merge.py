"""`peftcli merge`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from peftcli.cli.app import Json, Offline, app
from peftcli.cli.importing import large_imports


@app.command()
def merge(
    source: Annotated[
        Path | None, typer.Argument(help="A run folder or an adapter.", show_default=False)
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The folder to write.")] = None,
    fp32: Annotated[
        bool, typer.Option("--fp32/--no-fp32", help="Add the update in float32.")
    ] = True,
    save_dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Dtype of the written weights; the base's when absent."),
    ] = None,
    base: Annotated[
        Literal["dequantized", "original"] | None,
        typer.Option(help="What a 4-bit or fp8 base becomes; dequantized after such a run."),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="The base, where the adapter's own record is wrong.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH:WEIGHT", help="A further adapter; may be repeated."),
    ] = None,
    combine: Annotated[
        Literal["linear", "ties", "dare_linear", "dare_ties"],
        typer.Option(help="How several adapters become one update."),
    ] = "linear",
    density: Annotated[
        float | None, typer.Option(help="What TIES and DARE keep, as a share; half when absent.")
    ] = None,
    device: Annotated[
        Literal["cpu", "cuda"], typer.Option(help="Where the products are computed.")
    ] = "cpu",
    verify: Annotated[
        bool | None,
        typer.Option("--verify/--no-verify", help="Compare with base + adapter first."),
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .bin weights of somebody you trust.")
    ] = False,
    export: Annotated[
        Literal["ollama", "vllm-lora"] | None,
        typer.Option(help="A Modelfile beside the weights, or whether vLLM serves the adapter."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier merge.")
    ] = False,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base, exactly, and prove it."""
    from peftcli.errors import UsageError
    from peftcli.merge.ahead import read_ahead
    from peftcli.merge.options import MergeOptions, check_combination, parse_adapter
    from peftcli.merge.refuse import check_mergeable

    further = tuple(parse_adapter(text) for text in adapter or ())
    if source is None and not further:
        raise UsageError("merge: nothing to merge", "name a run folder or an adapter")
    paths = [*([source] if source else []), *(one.path for one in further)]
    check_combination(combine, density, len(paths))
    if export == "vllm-lora":
        _tell_servable(paths, output, offline=offline, as_json=as_json)
        return
    found = [check_mergeable(path, offline=offline) for path in paths]
    read_ahead(found[0], base_model)
    with large_imports():
        from peftcli.merge.run import run
    from peftcli.merge.show import show_merge

    options = MergeOptions(
        output=output,
        fp32=fp32,
        save_dtype=save_dtype,
        base=base,
        base_model=base_model,
        adapters=further,
        combine=combine,
        density=density,
        device=device,
        verify=verify,
        allow_pickle=allow_pickle,
        export=export,
        overwrite=overwrite,
        offline=offline,
    )
    result = run(source, options, lambda text: print(text, file=sys.stderr))
    show_merge(result, as_json=as_json)


def _tell_servable(paths: list[Path], output: Path | None, *, offline: bool, as_json: bool) -> None:
    from peftcli.errors import UsageError
    from peftcli.merge.servable import check_servable
    from peftcli.merge.show import show_servable
    from peftcli.merge.source import find_adapter

    if output is not None:
        raise UsageError(
            "--export vllm-lora: looks at the adapter and writes nothing, so --output has no use",
            "leave one of the two away",
        )
    if len(paths) > 1:
        raise UsageError(
            f"--export vllm-lora: looks at one adapter, and {len(paths)} are named",
            "ask for each in turn; what they make together is served merged",
        )
    show_servable(check_servable(find_adapter(paths[0], offline=offline)), as_json=as_json)
