"""Leads and questions out of the packages' formats, and which of the questions the leads answer."""

import io
import json
import zipfile
from pathlib import Path

import pytest

from dgpo_core.agent.answers import contains_answer
from dgpo_core.datasets.records import Passage, Question
from dgpo_core.errors import UserError
from dgpo_core.smol import (
    DPR_FILES,
    JAR,
    LEADS,
    PLACES,
    TOPICS,
    Lead,
    answerable,
    capitals,
    comparisons,
    makers,
    parse_dpr,
    people,
    read_dpr_questions,
    read_leads,
    two_hops,
)

ROWS = [
    # title, extract, description, topic
    (
        "Niger",
        "Niger is a country in West Africa.\nIts capital is Niamey.",
        "Country in West Africa",
        "Geography",
    ),
    ("Niger River", "The Niger River flows through Mali.", "River in West Africa", "Geography"),
    ("Kabuki", "Kabuki is a form of Japanese theatre.", "Classical Japanese dance-drama", "Arts"),
    (
        "Middlemarch",
        "Middlemarch is a novel by George Eliot.",
        "1871 novel by English author George Eliot",
        "Arts",
    ),
    ("Casablanca (film)", "Casablanca is a film. It was seen by Ingrid Bergman.", "1942 film", "Arts"),
    ("George Eliot", "Mary Ann Evans was a novelist.", "English novelist (1819–1880)", "People"),
    ("Ingrid Bergman", "Ingrid Bergman was an actress.", "Swedish actress (1915–1982)", "People"),
    ("Tiger Woods", "Tiger Woods is a golfer.", "American golfer (born 1975)", "People"),
    ("Bede", "Bede was a monk.", "English monk (c. 672–735)", "People"),
    ("Abbas", "Abbas was a shah.", "Shah (r. 1588–1629)", "People"),
]

PLACE_ROWS = [
    ROWS[0],
    (
        "Mali",
        "Mali is a country in West Africa. Its capital is Bamako.",
        "Country in West Africa",
        "Geography",
    ),
    ("Bamako", "Bamako is a city.", "Capital and largest city of Mali", "Geography"),
    ("Niamey", "Niamey is a city.", "Capital of Niger", "Geography"),
    ("Kano", "Kano is a city.", "City in Kano State, Nigeria", "Geography"),
    ("Timbuktu", "Timbuktu is a city.", "City in Tombouctou Region, Mali", "Geography"),
    ("Agadez", "Agadez lies north of Niamey.", "City in Niger", "Geography"),  # the answer stands in it
    ("Mali Desert", "It is dry.", "Desert of Mali", "Geography"),  # the country stands in its name
    ("Griot", "Griots sing.", "Singers in Mali", "Arts"),
]


def write_leads(wheel: Path, among: list[tuple[str, str, str, str]] = ROWS) -> None:
    rows = {
        title: {"title": title, "extract": extract, "description": description, "topic": topic}
        for title, extract, description, topic in among
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(LEADS, json.dumps(rows))


@pytest.fixture
def leads(tmp_path: Path) -> list[Lead]:
    write_leads(tmp_path / "leads.whl")
    return read_leads(tmp_path / "leads.whl")


@pytest.fixture
def places(tmp_path: Path) -> list[Lead]:
    write_leads(tmp_path / "places.whl", PLACE_ROWS)
    return read_leads(tmp_path / "places.whl")


def test_a_lead_is_a_passage_that_begins_with_its_description(leads: list[Lead]) -> None:
    first = leads[0].passage
    assert (first.id, first.title) == ("0", "Niger")
    assert first.text == "Country in West Africa. Niger is a country in West Africa. Its capital is Niamey."
    assert [lead.passage.id for lead in leads] == [str(n) for n in range(len(ROWS))]


@pytest.mark.parametrize(
    ("content", "question", "answers"),
    [
        ("who sings\t['Linda Davis']\r\n", "who sings", ["Linda Davis"]),
        # quoted as CSV, because of the quotes in the list
        ("""where\t"['Ingres', ""Château d'Amboise""]"\r\n""", "where", ["Ingres", "Château d'Amboise"]),
        # and quoted twice: read once, this is a string, whose letters would count as answers
        ('''who\t"""['Hal', 'Al']"""\r\n''', "who", ["Hal", "Al"]),
        ("""what\t['""flawed democracy""']\n""", "what", ["flawed democracy"]),
        ('"""How many shapes in """"Crackers""""?"""\t[\'18\']\n', 'How many shapes in "Crackers"?', ["18"]),
        (
            '{"question": "what do they speak?", "answer": ["Patois", "English"]}\n',
            "what do they speak?",
            ["Patois", "English"],
        ),
    ],
)
def test_every_way_in_which_the_lists_are_written(content: str, question: str, answers: list[str]) -> None:
    assert list(parse_dpr(io.BytesIO(content.encode()))) == [(question, answers)]


def write_jar(wheel: Path, contents: dict[str, str]) -> None:
    jar = io.BytesIO()
    with zipfile.ZipFile(jar, "w") as archive:
        for file, content in contents.items():
            archive.writestr(f"{TOPICS}/{file}", content)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(JAR, jar.getvalue())


def test_questions_are_read_out_of_the_jar_in_the_wheel(tmp_path: Path) -> None:
    contents = {file: f"of {name} {split}\t['x']\n" for (name, split), file in DPR_FILES.items()}
    write_jar(tmp_path / "p.whl", contents)
    found = read_dpr_questions(tmp_path / "p.whl")
    assert {split: [q.question for q in own] for split, own in found.items()} == {
        (name, split): [f"of {name} {split}"] for name, split in DPR_FILES
    }
    del contents["topics.nq.dev.txt"]
    write_jar(tmp_path / "p.whl", contents)
    with pytest.raises(UserError, match=r"has no topics-and-qrels/topics\.nq\.dev\.txt"):
        read_dpr_questions(tmp_path / "p.whl")
    write_leads(tmp_path / "other.whl")
    with pytest.raises(UserError, match=r"other\.whl: it has no .*fatjar\.jar"):
        read_dpr_questions(tmp_path / "other.whl")


def ask(text: str, *answers: str) -> Question:
    return Question("q", text, answers)


@pytest.mark.parametrize(
    ("question", "title"),
    [
        (ask("what is the capital of niger", "Niamey"), "Niger"),
        (ask("which country does the Niger River flow through?", "Mali"), "Niger River"),  # the longest title
        (
            ask("Which Japanese theatre of dance-drama is classical?", "Kabuki"),
            "Kabuki",
        ),  # the answer is the title
        (ask("Where did Casablanca's actress Ingrid Bergman live?", "Rome"), None),
        (ask("is niger in west africa", "Africa"), None),  # the answer stands in the question
        (ask("what letter does niger begin with", "n"), None),
        (ask("what is the capital of chad", "Niamey"), None),
    ],
)
def test_what_the_leads_answer(leads: list[Lead], question: Question, title: str | None) -> None:
    kept = answerable(leads, {("nq", "test"): [question]})["nq", "test"]
    assert [q.metadata["golden_passages"][0]["title"] for q in kept] == ([title] if title else [])


def test_a_question_stands_in_one_split_only(leads: list[Lead]) -> None:
    question, other = ask("What is the capital of Niger?", "Niamey"), ask("the capital of niger", "Niamey")
    again = ask("what is the capital of NIGER", "Niamey")
    kept = answerable(leads, {("nq", "test"): [question], ("triviaqa", "train"): [again, other]})
    assert [q.question for q in kept["triviaqa", "train"]] == ["the capital of niger"]
    assert len(kept["nq", "test"]) == 1


def test_years_of_a_life_and_nothing_else(leads: list[Lead]) -> None:
    assert {p.lead.passage.title: (p.born, p.died) for p in people(leads)} == {
        "George Eliot": (1819, 1880),
        "Ingrid Bergman": (1915, 1982),
        "Tiger Woods": (1975, None),
    }


def test_comparisons_are_answered_by_the_years() -> None:
    rows = [(f"P{n}", 1500 + 7 * n, 1560 + 5 * n) for n in range(60)]
    leads = [
        Lead(lead.passage, lead.description, "People")
        for lead in (_person(n, *row) for n, row in enumerate(rows))
    ]
    years = {name: (born, died) for name, born, died in rows}
    splits = comparisons(people(leads))
    assert splits == comparisons(people(leads))
    names: dict[str, set[str]] = {}
    for (_, split), questions in splits.items():
        assert questions and len({q.question for q in questions}) == len(questions)
        for question in questions:
            passages = question.metadata["golden_passages"]
            pair = [passage["title"] for passage in passages]
            place = 1 if "died" in question.question else 0
            assert question.golden_answers == (min(pair, key=lambda name: years[name][place]),)
            assert question.question.endswith(f" first, {pair[0]} or {pair[1]}?")
            names.setdefault(split, set()).update(pair)
    assert not names["train"] & names["test"], "test questions are about other people"


def _person(number: int, name: str, born: int, died: int) -> Lead:
    description = f"A person ({born} – {died})"
    return Lead(Passage(str(number), name, f"{description}. {name} lived."), description, "People")


def test_two_hops_lead_from_a_place_to_the_capital_of_its_country(places: list[Lead]) -> None:
    questions = [question for own in capitals(places).values() for question in own]
    assert {q.question: q.golden_answers for q in questions} == {
        "What is the capital of the country where Timbuktu lies?": ("Bamako",),
    }
    first, second = questions[0].metadata["golden_passages"]
    assert first["evidence"] == "Timbuktu: City in Tombouctou Region, Mali."
    assert (second["title"], second["evidence"]) == ("Mali", "Its capital is Bamako.")


def test_two_hops_lead_from_a_work_to_its_maker(leads: list[Lead]) -> None:
    questions = [question for own in makers(leads, people(leads)).values() for question in own]
    assert {q.question: q.golden_answers for q in questions} == {
        "In which year was the author of Middlemarch born?": ("1819",),
        "In which year did the author of Middlemarch die?": ("1880",),
    }
    first, second = questions[0].metadata["golden_passages"]
    assert (first["title"], second["title"]) == ("Middlemarch", "George Eliot")
    assert first["evidence"] == "Middlemarch: 1871 novel by English author George Eliot."
    assert second["evidence"] == "George Eliot: English novelist (1819 – 1880)."
    assert all(contains_answer(second["text"], list(q.golden_answers)) for q in questions)


def test_two_hops_of_all_kinds_are_mixed(leads: list[Lead], places: list[Lead]) -> None:
    many = [*leads, *places, *(_place(n, "Mali") for n in range(12))]
    splits = two_hops(many, people(many))
    assert splits == two_hops(many, people(many))
    questions = [question for own in splits.values() for question in own]
    asked = [question.question for question in questions]
    written = [*makers(many, people(many)).values(), *capitals(many).values()]
    assert sorted(asked) == sorted(question.question for own in written for question in own)
    assert sum("capital" in question for question in asked) == PLACES, "of one country no more"


def _place(number: int, country: str) -> Lead:
    description = f"City in {country}"
    passage = Passage(f"p{number}", f"Town{number}", f"{description}. It is small.")
    return Lead(passage, description, "Geography")
