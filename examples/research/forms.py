"""Training prompts of five forms, each with several questions: tables, records, facts inside prose, lists, passages.

None of them is JSON, a key of hexadecimal digits, a Wikipedia passage or a list of access codes: those are measured.
"""

import inspect
import random
from collections.abc import Callable
from importlib import import_module

FIRST = """
    Adele Amir Anouk Asta Bela Benno Birgit Carlos Chiara Damian Dario Delia Edda Elif Enzo Fatima Farid Fenna Gideon
    Greta Hamid Helga Ilse Imran Jarek Jelena Kenji Kofi Lars Leila Livia Magda Malik Mina Nils Noor Ottilie Pavel
    Pilar Rafael Ravi Rosalind Sandor Selma Tariq Thea Umar Valerie Wilma Yusuf Zelda Zoltan
""".split()  # noqa: SIM905
LAST = """
    Abbott Alvarez Baines Becker Castell Dimitrov Eklund Farkas Fontaine Gruber Halloran Ishida Jansen Kaplan Kovacs
    Lindqvist Marchetti Nakamura Novak Okafor Petrov Quist Rossi Salazar Tanaka Ulrich Varga Weber Yilmaz Zeman
""".split()  # noqa: SIM905
WORDS = """
    amber anchor apricot basalt beacon birch bronze candle canyon cedar cobalt copper coral crystal dawn delta ember
    falcon fern flint garnet glacier harbor hazel heron indigo iris ivory jasper juniper lantern lilac linen maple
    marble meadow mint moss nectar oak ocean olive onyx opal orchid pearl pepper pine plum quartz raven river ruby
    saffron sage silver slate spruce sterling thistle timber topaz tulip velvet violet walnut willow winter
""".split()  # noqa: SIM905
CITIES = """
    Aarhus Bergen Bilbao Bologna Bratislava Cordoba Dresden Essen Fez Ghent Graz Haifa Izmir Jaipur Kazan Kyoto Leeds
    Lima Lyon Malmo Medellin Nagoya Nairobi Odessa Oporto Perth Quito Riga Salvador Sapporo Seville Sofia Split Tampere
    Tbilisi Turin Utrecht Valencia Vilnius Wroclaw Zagreb
""".split()  # noqa: SIM905
JOBS = """
    architect baker beekeeper botanist carpenter cellist chemist cook dentist diver editor farmer gardener geologist
    glazier judge librarian mason mechanic midwife nurse painter pharmacist pilot plumber potter printer sailor
    surgeon surveyor tailor teacher translator weaver welder
""".split()  # noqa: SIM905
MONTHS = "January February March April May June July August September October November December".split()  # noqa: SIM905
DOCUMENTED_MODULES = (
    "argparse", "collections", "datetime", "decimal", "functools", "inspect", "logging", "multiprocessing", "random",
    "socket", "statistics", "subprocess", "tarfile", "threading", "typing", "unittest", "urllib.request",
)  # fmt: skip

Prompt = tuple[str, list[tuple[str, str]]]
"""A text, and questions about it with their answers."""


def docstrings() -> str:
    """Ordinary text: the documentation of Python's standard library."""
    members = (member for name in DOCUMENTED_MODULES for _, member in inspect.getmembers(import_module(name)))
    docs = (inspect.getdoc(member) for member in members)
    return "\n\n".join(dict.fromkeys(doc for doc in docs if doc and len(doc) > 200))


def draw(rng: random.Random, text: str, questions: int, joined: int = 1) -> list[dict[str, str]]:
    """A chat about `joined` prompts one after the other, each of a form drawn at random, with `questions` questions at
    places drawn uniformly."""
    parts = [rng.choice(FORMS)(rng, text) for _ in range(joined)]
    shown = "\n\n".join(part for part, _ in parts)
    pairs = [pair for _, of_part in parts for pair in of_part]
    messages = []
    for turn, (question, answer) in enumerate(rng.sample(pairs, min(questions, len(pairs)))):
        messages.append({"role": "user", "content": question if turn else f"{shown}\n\n{question}"})
        messages.append({"role": "assistant", "content": answer})
    return messages


def table(rng: random.Random, text: str) -> Prompt:
    columns = rng.sample([*KINDS], rng.randint(2, 3))
    names = people(rng, rng.randint(10, 20))
    rows = [[KINDS[column](rng) for column in columns] for _ in names]
    lines = ["| name | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(row) + " |" for name, row in zip(names, rows, strict=True)]
    return "\n".join(lines), [
        (f"What is the {column} of {name}?", value)
        for name, row in zip(names, rows, strict=True)
        for column, value in zip(columns, row, strict=True)
    ]


def records(rng: random.Random, text: str) -> Prompt:
    columns = rng.sample([*KINDS], rng.randint(2, 3))
    shown, pairs = [], []
    for name in people(rng, rng.randint(8, 16)):
        values = {column: KINDS[column](rng) for column in columns}
        shown.append("\n".join([f"Name: {name}", *(f"{column.capitalize()}: {v}" for column, v in values.items())]))
        pairs += [(f"Look up {name}. Which {column} is given?", value) for column, value in values.items()]
    return "\n\n".join(shown), pairs


def list_of_items(rng: random.Random, text: str) -> Prompt:
    column = rng.choice([*KINDS])
    pattern = rng.choice(("- {}: {}", "{} = {}", "* {} -> {}", "{}\t{}"))
    keys = [" ".join(pair) for pair in zip(rng.sample(WORDS, 30), rng.sample(WORDS[::-1], 30), strict=True)]
    keys = keys[: rng.randint(14, 30)]
    values = [KINDS[column](rng) for _ in keys]
    shown = "\n".join(pattern.format(key, value) for key, value in zip(keys, values, strict=True))
    return shown, [(f'Which entry belongs to "{key}"?', value) for key, value in zip(keys, values, strict=True)]


def prose(rng: random.Random, text: str) -> Prompt:
    """Facts between the sentences of ordinary text."""
    start = rng.randrange(len(text) - 4000)
    sentences = [" ".join(sentence.split()) for sentence in text[start : start + 3000].split(". ")][1:-1]
    while sum(map(len, sentences)) > 1800:
        sentences.pop()
    pairs = []
    for name in people(rng, rng.randint(4, 7)):
        column = rng.choice([*KINDS])
        value = KINDS[column](rng)
        sentences.insert(rng.randint(0, len(sentences)), f"For {name}, the {column} is {value}")
        pairs.append((f"According to the text, what is the {column} of {name}?", value))
    return ". ".join(sentences) + ".", pairs


def passages(rng: random.Random, text: str) -> Prompt:
    """Short lives of people, as documents with a title, and questions with short answers."""
    shown, pairs = [], []
    for number, name in enumerate(people(rng, rng.randint(6, 9)), start=1):
        city, home, job = KINDS["city"](rng), KINDS["city"](rng), KINDS["profession"](rng)
        year, month, partner = rng.randint(1890, 1990), rng.choice(MONTHS), people(rng, 1)[0]
        book = f"The {rng.choice(WORDS).capitalize()} {rng.choice(WORDS).capitalize()}"
        shown.append(
            f"Document [{number}](Title: {name}) {name} was born in {city} in {month} {year} and became a {job}. "
            f"In {year + rng.randint(20, 40)} a move to {home} brought the friendship with {partner}, to whom "
            f"the book {book} is dedicated. It sold {rng.randint(2, 99)},000 copies."
        )
        pairs.append(
            rng.choice(
                [
                    (f"where was {name} born", city),
                    (f"what did {name} do for a living", job),
                    (f"when was {name} born", f"{month} {year}"),
                    (f"who is the book by {name} dedicated to", partner),
                    (f"what is the title of the book by {name}", book),
                ]
            )
        )
    return "\n".join(shown), [(f"Question: {question}\nAnswer:", answer) for question, answer in pairs]


def people(rng: random.Random, count: int) -> list[str]:
    return [f"{first} {rng.choice(LAST)}" for first in rng.sample(FIRST, count)]


def _badge(rng: random.Random) -> str:
    return "".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=2)) + f"-{rng.randint(100, 999)}"


KINDS: dict[str, Callable[[random.Random], str]] = {
    "phone number": lambda rng: f"{rng.randint(100, 999)} {rng.randint(1000, 9999)}",
    "room": lambda rng: f"{rng.randint(1, 9)}.{rng.randint(10, 99)}",
    "badge": _badge,
    "city": lambda rng: rng.choice(CITIES),
    "profession": lambda rng: rng.choice(JOBS),
    "password": lambda rng: "-".join(rng.sample(WORDS, 3)),
    "birthday": lambda rng: f"{rng.choice(MONTHS)} {rng.randint(1, 28)}",
}
"""What questions ask for: numbers, words, phrases, mixed characters."""

FORMS: tuple[Callable[[random.Random, str], Prompt], ...] = (table, records, list_of_items, prose, passages)
