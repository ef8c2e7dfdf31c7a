"""The page at /, in a real browser. Each test fails, too, when a script of the page does or its security policy is broken."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import axe_core_python
import httpx
import pytest

from export.bundle import open_bundle, write_bundle
from tests.serve.browser import Browser
from tests.serve.harness import LABELS, TEXTS, Process
from tests.serve.page import ANSWERED, IN_BROWSER, NAMES, PROBLEM

pytestmark = IN_BROWSER
EVIL = "<img src=x onerror=alert(1)>"


def ask(url: str, inputs: str | list[str], **fields: Any) -> list[list[dict[str, Any]]]:
    """The rows of each text, as the API gives them."""
    response = httpx.post(f"{url}/predict", json={"inputs": inputs, **fields}, timeout=30)
    response.raise_for_status()
    return [prediction["labels"] for prediction in response.json()["predictions"]]


def names(rows: list[dict[str, Any]]) -> list[str]:
    return [row["name"] for row in rows]


def texts_of(page: Browser, selector: str) -> list[str]:
    found: list[str] = page.run(f"[...document.querySelectorAll({json.dumps(selector)})].map((element) => element.textContent)")
    return found


def submit(page: Browser, text: str) -> None:
    """Types into the text, which has the focus from the start, and waits for the answer."""
    page.type(text)
    page.press("Enter", ctrl=True)
    page.wait_for(ANSWERED)


def focus(page: Browser, selector: str) -> None:
    page.run(f"document.querySelector({json.dumps(selector)}).focus()")


def choose(page: Browser, picker: str, name: str) -> None:
    """Adds the first label found for a name to a filter, with the keyboard."""
    focus(page, f"#{picker}-input")
    page.type(name)
    page.wait_for(f"document.querySelector('#{picker}-input').ariaExpanded === 'true'")
    page.press("ArrowDown")
    page.press("Enter")


def wide_enough(page: Browser, width: int) -> bool:
    return bool(page.run("document.documentElement.scrollWidth") <= width)


def test_a_text_is_typed_and_its_labels_appear(page: Browser, server: Process) -> None:
    submit(page, TEXTS[0])
    (expected,) = ask(server.url, TEXTS[0])
    assert page.run(NAMES) == names(expected)
    assert texts_of(page, "#predictions .id") == [row["id"] for row in expected]
    scores = [float(text.removesuffix(" %")) for text in texts_of(page, ".score")]
    assert scores == pytest.approx([100 * row["score"] for row in expected], abs=0.06)
    widths = page.run(
        "[...document.querySelectorAll('.labels .bar')].map((bar) => 100 * bar.offsetWidth / bar.parentElement.offsetWidth)"
    )
    assert widths == pytest.approx(scores, abs=0.5)
    assert "500 labels" in page.run("document.querySelector('#facts').textContent")
    assert "the best is " + expected[0]["name"] in page.run("document.querySelector('#status').textContent")


def test_it_answers_while_one_types(page: Browser, server: Process) -> None:
    page.type(TEXTS[0])
    page.wait_for(ANSWERED)
    page.type(", " + TEXTS[1])
    expected = names(ask(server.url, f"{TEXTS[0]}, {TEXTS[1]}")[0])
    page.wait_for(f"JSON.stringify({NAMES}) === {json.dumps(json.dumps(expected, separators=(',', ':')))}")


def test_it_waits_to_be_asked_if_that_is_preferred(page: Browser) -> None:
    page.run("document.querySelector('#live').click()")
    focus(page, "#text")
    page.type(TEXTS[0])
    page.run("new Promise((go) => setTimeout(go, 600))")
    assert not any(url.endswith("/predict") for url in page.requests)
    page.press("Enter", ctrl=True)
    page.wait_for(ANSWERED)


def test_each_line_can_be_a_text(page: Browser, server: Process) -> None:
    page.run("document.querySelector('#lines').click()")
    focus(page, "#text")
    submit(page, f"{TEXTS[0]}\n\n{TEXTS[1]}\n")
    assert texts_of(page, "article h3") == TEXTS[:2]
    expected = ask(server.url, TEXTS[:2])
    assert page.run(NAMES) == names(expected[0]) + names(expected[1])
    assert page.run("document.querySelector('#status').textContent") == "20 labels for 2 texts"


def test_names_of_labels_are_offered_as_texts(page: Browser, server: Process) -> None:
    page.wait_for("document.querySelectorAll('#examples button').length > 1")
    page.run("document.querySelector('#examples button').click()")
    page.wait_for(ANSWERED)
    text = page.run("document.querySelector('#text').value")
    assert text.startswith("topic ")
    assert page.run(NAMES) == names(ask(server.url, text)[0])


def test_the_time_spent_is_shown_and_adds_up(page: Browser) -> None:
    submit(page, TEXTS[1])
    assert texts_of(page, "#times th") == [
        "Tokenizer",
        "Queue",
        "Encoder",
        "Scoring all labels",
        "HTTP and JSON",
        "Network and browser",
        "Total",
    ]
    *times, total = (float(text.removesuffix(" ms").replace(",", "")) for text in texts_of(page, "#times td:last-child"))
    assert sum(times) == pytest.approx(total, abs=2)  # rounded to whole ones, if the machine is that slow
    parts = page.run(
        "[...document.querySelectorAll('.part')].map(({ style }) => [style.marginInlineStart, style.width].map(parseFloat))"
    )
    end = 0.0
    for start, width in parts:
        assert start == pytest.approx(end, abs=0.1)  # each begins where the one before ended
        end = start + width
    assert end == pytest.approx(100, abs=0.1)


def test_scores_can_be_logits_with_the_same_bars(page: Browser, server: Process) -> None:
    submit(page, TEXTS[0])
    before = page.run("document.querySelector('.bar').style.width")
    focus(page, "[name=scores]:checked")
    page.press("ArrowRight")
    (expected,) = ask(server.url, TEXTS[0], scores="logit")
    page.wait_for(f"document.querySelector('.score').textContent === '{expected[0]['score']:.2f}'")
    assert float(page.run("document.querySelector('.bar').style.width").rstrip("%")) == pytest.approx(float(before.rstrip("%")))


def test_the_lowest_score_leaves_out_the_same_labels_in_either_unit(page: Browser, server: Process) -> None:
    submit(page, TEXTS[0])
    (rows,) = ask(server.url, TEXTS[0])
    least = 50 * (rows[2]["score"] + rows[3]["score"])  # between the third and the fourth, in %
    focus(page, "#min_score")
    page.type(f"{least:.4f}")
    page.wait_for("document.querySelectorAll('.labels li').length === 3")
    page.run("document.querySelector('[name=scores][value=logit]').click()")
    page.wait_for("!document.querySelector('.score').textContent.endsWith('%')")
    assert page.run(NAMES) == names(rows[:3])
    page.run("document.querySelector('#min_score').value = ''")
    focus(page, "#min_score")
    page.type("1000")
    page.wait_for("document.querySelector('#predictions').textContent.startsWith('No label')")


def test_labels_are_allowed_and_denied_with_the_keyboard(page: Browser, server: Process) -> None:
    submit(page, TEXTS[0])
    focus(page, "#allow-input")
    page.type("topic 12")
    page.wait_for("document.querySelector('#allow-input').ariaExpanded === 'true'")
    options = texts_of(page, "#allow-list .name")
    assert options == names(httpx.get(f"{server.url}/labels?query=topic+12&limit=8").json()["labels"])
    active = "document.getElementById(document.querySelector('#allow-input').getAttribute('aria-activedescendant'))"
    assert page.run(active) is None  # nothing is chosen before an arrow key is pressed
    page.press("ArrowDown")
    page.press("ArrowDown")
    assert page.run(f"{active}.querySelector('.name').textContent") == options[1]
    assert page.run(f"{active}.ariaSelected") == "true"
    page.press("ArrowUp")
    page.press("ArrowUp")  # round to the last one
    assert page.run(f"{active}.querySelector('.name').textContent") == options[-1]
    page.press("ArrowDown")
    page.press("Enter")
    assert page.run("document.querySelector('#allow-input').ariaExpanded") == "false"
    choose(page, "allow", "topic 77")
    chips = [options[0], "topic 77"]
    assert texts_of(page, "#allow-chips .name") == chips
    page.wait_for(f"{ANSWERED} && document.querySelectorAll('.labels li').length === 2")
    assert sorted(page.run(NAMES)) == sorted(chips)

    choose(page, "deny", "topic 77")
    page.wait_for("document.querySelectorAll('.labels li').length === 1")
    assert page.run(NAMES) == chips[:1]
    assert page.run("document.querySelector('#options-count').textContent") == "(2 changed)"

    focus(page, "#allow-input")
    page.press("Backspace")
    page.press("Backspace")
    page.wait_for("document.querySelectorAll('.labels li').length === 10")
    assert texts_of(page, "#allow-chips .name") == []
    assert ("button", "Remove topic 77 t-77") in page.controls()
    page.run("document.querySelector('#deny-chips button').click()")
    page.wait_for("document.querySelector('#options-count').textContent === ''")
    assert page.run("document.activeElement.id") == "deny-input"


def test_a_found_label_is_chosen_with_the_mouse(page: Browser) -> None:
    focus(page, "#deny-input")
    page.type("topic 3")
    page.wait_for("document.querySelectorAll('#deny-list [role=option]').length > 2")
    box = page.run("document.querySelectorAll('#deny-list [role=option]')[1].getBoundingClientRect().toJSON()")
    name = texts_of(page, "#deny-list .name")[1]
    where = {"x": box["x"] + 20, "y": box["y"] + 10, "button": "left", "clickCount": 1}
    page.call("Input.dispatchMouseEvent", type="mousePressed", **where)
    page.call("Input.dispatchMouseEvent", type="mouseReleased", **where)
    page.wait_for("document.querySelectorAll('#deny-chips button').length === 1")
    assert texts_of(page, "#deny-chips .name") == [name]


def test_escape_closes_the_list_and_then_empties_the_field(page: Browser) -> None:
    focus(page, "#allow-input")
    page.type("topic")
    page.wait_for("!document.querySelector('#allow-list').hidden")
    page.press("Escape")
    assert page.run("document.querySelector('#allow-list').hidden")
    assert page.run("document.querySelector('#allow-input').value") == "topic"
    page.press("Escape")
    assert page.run("document.querySelector('#allow-input').value") == ""


def test_a_label_is_also_chosen_by_its_whole_id(page: Browser) -> None:
    focus(page, "#allow-input")
    page.type("t-41")
    page.wait_for("document.querySelector('#allow-note').textContent.startsWith('No name has this')")
    page.press("Enter")
    page.wait_for("document.querySelectorAll('#allow-chips button').length === 1")
    assert texts_of(page, "#allow-chips .name") == ["topic 41"]
    page.type("t-4100")
    page.press("Enter")
    page.wait_for("document.querySelector('#allow-note').textContent === 'No label has this name or id.'")
    assert len(texts_of(page, "#allow-chips .name")) == 1


def test_everything_can_be_done_with_the_keyboard(page: Browser, server: Process) -> None:
    page.wait_for("!document.querySelector('#examples').hidden")
    page.type(TEXTS[1])
    visited = []
    for _ in range(20):
        page.press("Tab")
        element = "document.activeElement"
        visited.append(page.run(f"{element}.id || {element}.name || {element}.closest('[id]').id"))
        assert page.run(f"getComputedStyle({element}).outlineStyle !== 'none' || {element}.name === 'scores'"), visited
        if visited[-1] == "deny-input":
            break
    offered = ["examples"] * visited.count("examples")
    assert visited == ["lines", "live", "go", *offered, "options", "top_k", "scores", "min_score", "allow-input", "deny-input"]
    focus(page, "#go")
    page.press("Enter")
    page.wait_for(ANSWERED)
    assert page.run(NAMES) == names(ask(server.url, TEXTS[1])[0])
    focus(page, "#top_k")
    page.press("ArrowRight")
    page.wait_for("document.querySelectorAll('.labels li').length === 11")
    assert page.run("document.querySelector('#top_k-shown').value") == "11"


def test_every_control_has_a_name_and_a_role_for_screen_readers(page: Browser) -> None:
    submit(page, TEXTS[0])
    page.run("document.querySelector('#exchange').open = true")
    controls = page.controls()
    assert {
        ("textbox", "Text"),
        ("checkbox", "Each line is a text"),
        ("button", "Predict"),
        ("slider", "Labels for each text"),
        ("radio", "Probability"),
        ("radio", "Logit"),
        ("spinbutton", "Lowest score in %"),
        ("combobox", "Only these labels"),
        ("combobox", "Never these labels"),
        ("region", "JSON of the response"),
    } <= set(controls)
    assert all(name for _, name in controls)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_barrier(page: Browser, scheme: str) -> None:
    page.prefer(prefers_color_scheme=scheme)
    page.run("document.querySelector('#lines').click()")
    focus(page, "#text")
    submit(page, "\n".join(TEXTS[:2]))
    choose(page, "deny", "topic 12")
    page.run("document.querySelector('#exchange').open = true")
    focus(page, "#allow-input")
    page.type("topic")
    page.wait_for("!document.querySelector('#allow-list').hidden")
    page.press("ArrowDown")
    show_problem = """import("./page/problem.js").then(({ showProblem }) => showProblem(
        { status: 422, errors: [{ pointer: "/inputs/1", detail: "is too long" }], request_id: "r-1" }))"""
    page.run(show_problem)
    page.run("document.querySelector('#key-form').hidden = false")
    (script,) = Path(axe_core_python.__file__).parent.glob("axe.min.js")
    page.run(script.read_text() + "; 0")
    found = page.run("axe.run().then(({ violations }) => violations)")
    assert [(fault["id"], [node["html"] for node in fault["nodes"]]) for fault in found] == []
    page.errors.clear()  # axe itself writes styles, which the page's policy does not let it


def test_the_command_that_is_shown_gives_the_answer_that_is_shown(page: Browser, server: Process) -> None:
    submit(page, 'it\'s a "text" with \\ and $HOME\nin two lines')
    curl, url, *options = shlex.split(page.run("document.querySelector('#curl').textContent").replace("\\\n", " "))
    assert curl == "curl"
    (kind, header), (data, body) = zip(options[::2], options[1::2], strict=True)
    assert (kind, data) == ("-H", "-d")
    answer = httpx.post(url, headers=dict([header.split(": ")]), content=body).json()
    shown = json.loads(page.run("document.querySelector('#response').textContent"))
    assert answer["predictions"] == shown["predictions"]
    assert json.loads(page.run("document.querySelector('#request').textContent")) == json.loads(body)


def test_what_is_shown_can_be_copied(page: Browser, server: Process) -> None:
    page.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"], origin=server.url)
    submit(page, TEXTS[0])
    for what, expected in (("link", "location.href"), ("response", "document.querySelector('#response').textContent")):
        page.run(f"document.querySelector('[data-copy={what}]').click()")
        page.wait_for(f"document.querySelector('[data-copy={what}]').textContent === 'Copied'")
        assert page.run(f"navigator.clipboard.readText().then((text) => text === {expected})")


def test_a_link_carries_the_text_and_the_settings(page: Browser, server: Process) -> None:
    submit(page, "größer & mehr #1\nzwei")
    choose(page, "deny", "topic 12")
    page.run("document.querySelector('[name=scores][value=logit]').click()")
    focus(page, "#top_k")
    page.press("ArrowRight")
    page.wait_for(f"{ANSWERED} && document.querySelectorAll('.labels li').length === 11")
    link, shown = page.run("location.href"), page.run(NAMES)
    address = parse_qs(urlsplit(link).fragment)
    (denied,) = address.pop("deny")
    assert address == {"text": ["größer & mehr #1\nzwei"], "top_k": ["11"], "scores": ["logit"]}
    page.open("about:blank")
    page.open(link)
    page.wait_for(ANSWERED)
    assert page.run(NAMES) == shown
    assert texts_of(page, "#deny-chips .name") == names(httpx.get(f"{server.url}/labels?ids={denied}").json()["labels"])
    assert page.run("document.querySelector('#text').value") == "größer & mehr #1\nzwei"


def test_another_link_in_the_same_tab_is_followed(page: Browser, server: Process) -> None:
    submit(page, TEXTS[0])
    page.run("location.hash = '#text=parse%20a%20date&top_k=3'")
    expected = names(ask(server.url, "parse a date", top_k=3)[0])
    page.wait_for(f"JSON.stringify({NAMES}) === {json.dumps(json.dumps(expected, separators=(',', ':')))}")


def test_what_the_model_is_stands_on_the_page(page: Browser, server: Process) -> None:
    info = httpx.get(f"{server.url}/info").json()
    shown = page.run("document.querySelector('#about-list').innerText")
    for fact in (info["model_version"], "24 of 96 inputs (shared, bf16)", "96 of 96 inputs (dense, fp32)", "P@1 0.500"):
        assert fact in shown


@pytest.fixture(scope="module")
def evil(bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A server of a bundle whose label ids and names are markup."""
    path, original = tmp_path_factory.mktemp("evil") / "bundle", open_bundle(bundle_path)
    write_bundle(
        path,
        name=EVIL,
        head=original.head,
        labels=((f"<i>{i}</i>", f"{EVIL} {i}") for i in range(LABELS)),
        tokenizer=original.tokenizer_file.read_text(),
        max_length=original.manifest.max_length,
        write_encoder=lambda file: shutil.copy(original.encoder_file, file),
        metrics={},
    )
    process = Process(path)
    yield process
    process.end()


def test_names_are_text_and_never_markup(tab: Browser, evil: Process) -> None:
    tab.open(f"{evil.url}/#text={quote(EVIL)}&allow={quote(EVIL)}")
    tab.wait_for("!document.querySelector('#examples').hidden")
    tab.wait_for(PROBLEM)
    assert tab.run("document.querySelector('#model').textContent") == EVIL
    assert texts_of(tab, "#allow-chips .name") == [EVIL]
    tab.run("document.querySelector('#allow-chips button').click()")
    tab.wait_for(ANSWERED)
    assert all(name.startswith(EVIL) for name in [*tab.run(NAMES), *texts_of(tab, "#examples button")])
    choose(tab, "deny", "<img")
    tab.wait_for("document.querySelectorAll('#deny-chips button').length === 1")
    tab.type("onerror")
    tab.wait_for("!document.querySelector('#deny-list').hidden")
    assert tab.run("document.querySelectorAll('main img, main i').length") == 0


def test_no_script_of_the_page_could_make_markup_of_text(page: Browser) -> None:
    refused = "(() => { try { document.body.insertAdjacentHTML('beforeend', '<b>'); } catch (error) { return error.name; } })()"
    assert page.run(refused) == "TypeError"
    page.wait_for("true")
    assert len(page.errors) == 1  # the driver does see what the policy complains of
    page.errors.clear()


def test_it_asks_nobody_but_its_server(page: Browser, server: Process) -> None:
    submit(page, TEXTS[0])
    assert len(page.requests) >= 3
    assert all(url.startswith(server.url) for url in page.requests)


def test_its_files_are_asked_for_again_only_when_they_changed(client: httpx.Client) -> None:
    for path in ("/", "/page/page.js", "/page/page.css"):
        response = client.get(path)
        assert response.status_code == 200
        assert response.headers["cache-control"] == "no-cache"
        assert client.get(path, headers={"If-None-Match": response.headers["etag"]}).status_code == 304
    policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert client.get("/page/nothing.js").status_code == 404
    assert client.get("/page/..%2Fpage.py").status_code == 404


@pytest.mark.parametrize("width", [320, 390])
def test_it_fits_a_telephone(tab: Browser, server: Process, width: int) -> None:
    tab.resize(width, 640)
    tab.open(f"{server.url}/")
    tab.wait_for("!document.querySelector('#examples').hidden")
    assert not tab.run("document.querySelector('#options').open")  # the answer is nearer
    assert wide_enough(tab, width)
    submit(tab, "anunbreakabletext" * 20)
    for part in ("options", "exchange"):
        tab.run(f"document.querySelector('#{part}').open = true")
    tab.run("document.querySelector('#predictions .name').textContent = 'module.function_of_a_very_long_name' * 5")
    choose(tab, "deny", "topic 12")
    assert wide_enough(tab, width)
    box = "document.querySelector('#predictions .{}').getBoundingClientRect().toJSON()"
    assert tab.run(box.format("id"))["top"] >= tab.run(box.format("name"))["bottom"]


def test_it_follows_a_preference_for_the_dark(page: Browser) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.run(background)
    page.prefer(prefers_color_scheme="dark")
    assert page.run(background) != light


def test_the_description_of_the_api_needs_nobody_else_either(tab: Browser, server: Process) -> None:
    tab.open(f"{server.url}/docs")
    methods = [method for path in httpx.get(f"{server.url}/openapi.json").json()["paths"].values() for method in path]
    tab.wait_for(f"document.querySelectorAll('.opblock').length === {len(methods)}")
    tab.run("document.querySelector('.opblock-post .opblock-summary-control').click()")
    tab.wait_for("document.querySelector('.opblock-post .response-col_status') !== null")
    assert all(url.startswith((server.url, "data:")) for url in tab.requests)
