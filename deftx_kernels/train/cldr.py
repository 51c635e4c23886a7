"""Short labelled texts in many languages from CLDR, the Unicode locale data that Babel carries. No download.

Every text is the display name of a territory, language, script, currency, unit or time zone; the label is its kind.
The same key ("territory/FR") has a name in every language, so the split is made by key and is the same in all of them.
"""

import hashlib
from functools import lru_cache

KINDS = ("currency", "language", "script", "territory", "time zone", "unit")

# A locale whose names for one kind number fewer than this is left out: its macro-F1 would rest on a handful of strings.
MIN_PER_KIND = 30


def _zone_name(zone) -> str | None:
    names = zone.get("long", {})
    return names.get("generic") or names.get("standard")


@lru_cache(maxsize=64)
def display_names(language: str) -> dict[tuple[str, str], str]:
    """Every display name of one language: {(kind, key): name}.

    Names that stand for two kinds ("Guernsey" is a territory and a time zone) are left out, because their label is
    ambiguous; so are names that are no longer than one character.

    Args:
        language: a CLDR locale name such as "en", "id" or "pt_BR".

    Raises:
        ValueError: Babel has no such locale.
    """
    from babel import Locale, UnknownLocaleError

    try:
        locale = Locale.parse(language)
    except (UnknownLocaleError, ValueError) as error:
        raise ValueError(
            f"language {language!r}: CLDR has no such locale ({error}); names look like 'en', 'id', 'pt_BR'"
        ) from None
    units = {key: forms.get("long") or forms.get("short") for key, forms in locale.unit_display_names.items()}
    tables = {
        "currency": locale.currencies,
        "language": locale.languages,
        "script": locale.scripts,
        "territory": locale.territories,
        "time zone": {key: _zone_name(zone) for key, zone in locale.meta_zones.items()},
        "unit": units,
    }
    names = {(kind, key): " ".join(name.split()) for kind in KINDS for key, name in tables[kind].items() if name}
    kinds_of: dict[str, set[str]] = {}
    for (kind, _), name in names.items():
        kinds_of.setdefault(name.casefold(), set()).add(kind)
    return {key: name for key, name in names.items() if len(kinds_of[name.casefold()]) == 1 and len(name) > 1}


def split_of(kind: str, key: str) -> str:
    """The split of a key, the same in every language and every run: "train" (70 %), "validation" (10 %) or "test" (20
    %).
    """
    place = int.from_bytes(hashlib.blake2b(f"{kind}/{key}".encode(), digest_size=8).digest()) % 100
    return "train" if place < 70 else "validation" if place < 80 else "test"


def kind_counts(language: str) -> dict[str, int]:
    """How many names of each kind `language` has."""
    counts = dict.fromkeys(KINDS, 0)
    for kind, _ in display_names(language):
        counts[kind] += 1
    return counts


def covered_languages(candidates=None, minimum: int = MIN_PER_KIND) -> list[str]:
    """The locales (all of Babel's languages by default) that have at least `minimum` names of every kind."""
    if candidates is None:
        from babel.localedata import locale_identifiers

        candidates = [name for name in locale_identifiers() if "_" not in name]
    return sorted(name for name in candidates if min(kind_counts(name).values()) >= minimum)


def load_cldr(languages: list[str], minimum: int = MIN_PER_KIND) -> dict[str, dict[str, list[dict]]]:
    """The CLDR task in several languages: {language: {"train" | "validation" | "test": rows}}.

    A row is {"id": "kind/key", "text", "label"}. No key is in two splits, and no validation or test string equals
    (ignoring case) a training string of any of `languages`; no test string equals a validation string either.

    Raises:
        ValueError: a language that CLDR does not have or covers too thinly, naming the kind.
    """
    for language in languages:
        kind, count = min(kind_counts(language).items(), key=lambda item: item[1])
        if count < minimum:
            raise ValueError(
                f"language {language!r}: CLDR has only {count} names of kind {kind!r}, at least {minimum} are needed"
            )
    splits: dict[str, dict[str, list[dict]]] = {}
    for language in languages:
        splits[language] = {"train": [], "validation": [], "test": []}
        for (kind, key), text in sorted(display_names(language).items()):
            splits[language][split_of(kind, key)].append({"id": f"{kind}/{key}", "text": text, "label": kind})
    seen: set[str] = set()
    for name in ("train", "validation", "test"):
        for language in languages:
            splits[language][name] = [row for row in splits[language][name] if row["text"].casefold() not in seen]
        seen |= {row["text"].casefold() for language in languages for row in splits[language][name]}
    return splits
