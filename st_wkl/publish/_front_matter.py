"""Changes of a card's front matter as changes of its text: what they do not touch stays to the letter.

Reading YAML and writing it again would make 1.1 of the version 1.10, `false` of `no`, and lose comments, quotes, order
and anchors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from huggingface_hub import RepoCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import eval_results_to_model_index

_INDEX = "model-index"


def with_changes(content: str, card: RepoCard, source: str | None = None) -> str:
    """Return a card's text with the changes that were made to `card`, which was read from it.

    Args:
        content: The card as its owner wrote it.
        card: The same card with other `text` and `data`.
        source: Name that marks the entries of the model-index that may be replaced; those of others stay.

    Raises:
        ValueError: If a change cannot be made without changing what the owner wrote, as where a list that is added to
            is used again by its anchor.
    """
    match = REGEX_YAML_BLOCK.search(content)
    if not match or not match.group(2).strip():
        return str(card)
    before, after = type(card)(content, ignore_metadata_errors=True).data.to_dict(), card.data.to_dict()
    block, changed = match.group(2), [key for key in {**before, **after} if before.get(key) != after.get(key)]
    newline = "\r\n" if "\r\n" in content else "\n"
    for key in changed:
        text = _with_results(block, card, source, newline) if key == _INDEX and source else None
        block = text or _changed(block, key, after.get(key), newline)
    _check(match.group(2), block, {key: after.get(key) for key in changed if key != _INDEX})
    return content[: match.start(2)] + block + content[match.end(2) : match.end()] + card.text


def _check(old: str, new: str, changes: Mapping[str, Any]) -> None:
    try:
        was, now = yaml.safe_load(f"{old}\n"), yaml.safe_load(f"{new}\n")
        kept = was.keys() - changes.keys() - {_INDEX}
        wrong = [key for key in kept if repr(was[key]) != repr(now.get(key))]
        wrong += [key for key, value in changes.items() if now.get(key) != value]
    except yaml.YAMLError:
        wrong = list(changes)
    if wrong:
        raise ValueError(
            f"README.md: st-wkl has to change {', '.join(changes) or _INDEX} in the front matter, which would change "
            f"what stands at {', '.join(map(str, wrong))}. If an anchor (&name) ties them together, write both out."
        )


def _changed(block: str, key: str, value: Any, newline: str) -> str:
    """Return the YAML text with another value of one key; None takes the key away."""
    tree = yaml.compose(block, Loader=yaml.SafeLoader)
    pairs = tree.value if isinstance(tree, yaml.MappingNode) else []
    place = next((number for number, (name, _) in enumerate(pairs) if name.value == key), None)
    if place is None:
        return block if value is None else f"{block}{newline}{_dump({key: value}, 0, newline).rstrip()}"
    name, node = pairs[place]
    following = pairs[place + 1][0].start_mark.index if place + 1 < len(pairs) else len(block)
    start, end = name.start_mark.index, _end(block, name.end_mark.index, following)
    own = name.end_mark.index <= node.start_mark.index <= end  # else it is an alias
    if value is None:
        rest = block[end:]
        return block[:start] + rest.lstrip("\r\n") if start == 0 else block[:start].rstrip("\r\n") + rest
    if own and isinstance(node, yaml.SequenceNode) and (text := _longer(block, node, value, end, newline)):
        return text
    if own and isinstance(node, yaml.ScalarNode) and isinstance(value, str) and node.style not in ("|", ">"):
        gap = "" if node.start_mark.index > name.end_mark.index + 1 else " "
        return block[: node.start_mark.index] + gap + _inline(value) + block[node.end_mark.index :]
    return block[:start] + _dump({key: value}, 0, newline).rstrip() + block[end:]


def _longer(block: str, node: yaml.SequenceNode, value: Any, end: int, newline: str) -> str | None:
    """Return the text with a list's new items behind those that it has, None if it is not merely longer."""
    had = yaml.safe_load(yaml.serialize(node))
    if not isinstance(value, list) or not had or value[: len(had)] != had:
        return None
    added = value[len(had) :]
    if node.flow_style:
        last = node.value[-1]
        alias = not node.start_mark.index < last.start_mark.index < node.end_mark.index
        at = node.end_mark.index - 1 if alias else last.end_mark.index
        return block[:at] + "".join(f", {_inline(item)}" for item in added) + block[at:]
    return block[:end] + newline + _dump(added, node.start_mark.column, newline).rstrip() + block[end:]


def _with_results(block: str, card: RepoCard, source: str, newline: str) -> str | None:
    """Return the text with the results of `source` replaced, None where the others' are not written in blocks."""
    results: list[Any] = getattr(card.data, "eval_results", None) or []
    ours = [entry for entry in results if entry.source_name == source]
    new = eval_results_to_model_index("", ours)[0]["results"] if ours else []
    index = dict(_pairs(yaml.compose(block, Loader=yaml.SafeLoader), block)).get(_INDEX)
    models = index[0].value if index and isinstance(index[0], yaml.SequenceNode) and not index[0].flow_style else []
    if len(models) != 1 or len(ours) == len(results):
        return None
    node, stop = dict(_pairs(models[0], block[: index[1]])).get("results", (None, 0)) if index else (None, 0)
    if not isinstance(node, yaml.SequenceNode) or node.flow_style or not node.value:
        return None
    starts = [block.rindex("-", 0, item.start_mark.index) for item in node.value]
    ends = [_end(block, *span) for span in zip(starts, [*starts[1:], stop], strict=True)]
    parts = [
        block[start:end]
        for start, end, item in zip(starts, ends, node.value, strict=True)
        if _source(yaml.safe_load(yaml.serialize(item))) != source
    ]
    parts += [_dump(new, node.start_mark.column, newline).strip()] if new else []
    return block[: starts[0]] + f"{newline}{' ' * node.start_mark.column}".join(parts) + block[ends[-1] :]


def _pairs(node: Any, block: str) -> Iterator[tuple[str, tuple[yaml.Node, int]]]:
    """Yield each key of a mapping that is written in a block with its value's node and where the next key begins."""
    pairs = node.value if isinstance(node, yaml.MappingNode) and not node.flow_style else []
    for place, (name, value) in enumerate(pairs):
        yield name.value, (value, pairs[place + 1][0].start_mark.index if place + 1 < len(pairs) else len(block))


def _source(result: Any) -> Any:
    source = result.get("source") if isinstance(result, Mapping) else None
    return source.get("name") if isinstance(source, Mapping) else None


def _end(block: str, start: int, following: int) -> int:
    """Return where the last line ends that is neither empty nor a comment on what follows."""
    lines = block[start:following].splitlines(keepends=True)
    while len(lines) > 1 and (not lines[-1].strip() or lines[-1].lstrip().startswith("#")):
        lines.pop()
    return start + len("".join(lines).rstrip())


def _inline(value: Any) -> str:
    """Return a value as it stands within a line."""
    text = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10**9).strip()
    return text.removeprefix("[").removesuffix("]")


def _dump(value: Any, column: int, newline: str) -> str:
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=10**9)
    return "".join(f"{' ' * column}{line}{newline}" for line in text.splitlines())
