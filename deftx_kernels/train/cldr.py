"""Short labelled texts in many languages from CLDR, the Unicode locale data that Babel carries. No download.

Every text is the display name of a territory, language, script, currency, unit or time zone; the label is its kind.
The same key ("territory/FR") has a name in every language, so the split is made by key and is the same in all of them.
"""

import hashlib
from collections import Counter
from functools import lru_cache

KINDS = ("currency", "language", "script", "territory", "time zone", "unit")

# Names of each kind that a locale must have: macro-F1 over fewer strings says little.
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
    """The split of a key, the same in every language and run: "train" (70 %), "validation" (10 %) or "test" (20 %)."""
    percent = int.from_bytes(hashlib.blake2b(f"{kind}/{key}".encode(), digest_size=8).digest()) % 100
    return "train" if percent < 70 else "validation" if percent < 80 else "test"


def load_cldr(languages: list[str]) -> dict[str, dict[str, list[dict]]]:
    """The CLDR task in several languages: {language: {"train" | "validation" | "test": rows}}.

    A row is {"id": "kind/key", "text", "label"}. No key is in two splits, and no validation or test string equals
    (ignoring case) a training string of any of `languages`; no test string equals a validation string either.

    Raises:
        ValueError: a language that CLDR does not have or covers too thinly, naming the kind.
    """
    for language in languages:
        counts = Counter(kind for kind, _ in display_names(language))
        kind = min(KINDS, key=lambda kind: counts[kind])
        if counts[kind] < MIN_PER_KIND:
            fault = f"CLDR has only {counts[kind]} names of kind {kind!r}, at least {MIN_PER_KIND} are needed"
            raise ValueError(f"language {language!r}: {fault}")
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


def language_name(code: str) -> str:
    """English name of a CLDR code, or the name as it is."""
    try:
        from babel import Locale

        return Locale.parse(code).get_display_name("en") or code
    except Exception:  # not a CLDR code, such as a folder's name
        return code.capitalize()
