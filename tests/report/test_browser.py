"""The page in a real browser, opened from disk with the network cut."""

import itertools

import pytest

import browser
import page_records
import sweeps
from divergent_tokens.report.page import page
from divergent_tokens.report.records import read_sources
from divergent_tokens.search.knapsack import least_harm
from divergent_tokens.search.overview import _options, overview
from divergent_tokens.sensitivities import read_sensitivities

PLANTED = '</script><script>window.planted=1</script><img src=x onerror="window.planted=1">%{x}&lt;'
KINDS = ("comparison", "sweep", "plan", "curve", "pruning", "verification")


@pytest.fixture(scope="module")
def started():
    with browser.running() as found:
        yield found


def written(folder, **options):
    """A page of one record of each kind."""
    files = page_records.folder(folder, **options)
    sources = read_sources([files[kind] for kind in KINDS])
    path = folder / "page.html"
    path.write_text(page(sources), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return written(tmp_path_factory.mktemp("plain"))


def planted_record():
    """Markup wherever a model or a file has its say."""
    record = page_records.comparison(domains=(PLANTED, "code"), languages=(PLANTED, "en"))
    record["base"] = {**record["base"], "reference": f"base{PLANTED}"}
    record["command"] = ["dtm", PLANTED]
    record["prompts"]["source"] = PLANTED
    record["prompts"]["texts"] = [PLANTED] * len(record["prompts"]["texts"])
    record["prompts"]["completions"] = [[PLANTED] * 24 for _ in record["prompts"]["completions"]]
    new = {c["name"]: f"{i}{PLANTED}" for i, c in enumerate(record["candidates"])}
    for pair in record["pairs"]:
        pair["a"], pair["b"] = new[pair["a"]], new[pair["b"]]
    for candidate in record["candidates"]:
        candidate["name"] = new[candidate["name"]]
        for row in candidate["rows"]:
            if not row["censored"]:
                row["base_token"] = row["candidate_token"] = PLANTED
        for example in candidate["examples"]:
            example["candidate_text"] = PLANTED * 2
    return record


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted") / "<img src=x onerror=window.planted=1>"
    folder.mkdir()
    sweep = page_records.renamed(sweeps.sweep(), [f"model.layers.0.{PLANTED}", PLANTED])
    return written(folder, record=planted_record(), sweep=sweep)


def draw_all(opened):
    """Every figure, wherever the window stands."""
    opened.page.evaluate("Promise.all([...FIGURES.keys()].map(draw))")


def quiet(opened):
    assert opened.said == []
    assert opened.asked == []


def test_all_figures_are_drawn_without_an_error_or_a_request(started, plain):
    with browser.opened(started, plain) as opened:
        draw_all(opened)
        names = opened.page.evaluate("[...FIGURES.keys()]")
        assert len(names) == 11
        for name in names:
            assert opened.page.locator(f"#figure-{name} svg.main-svg").count() > 0, name
        quiet(opened)


def test_figures_are_drawn_when_they_come_near(started, plain):
    with browser.opened(started, plain) as opened:
        assert opened.page.locator("#figure-zeros svg").count() == 0
        opened.page.locator("#figure-zeros").scroll_into_view_if_needed()
        opened.page.wait_for_selector("#figure-zeros[data-drawn]")


def test_planted_markup_is_text_and_does_not_run(started, planted):
    with browser.opened(started, planted) as opened:
        draw_all(opened)
        for choice in opened.page.locator("select.view").all():
            for i in range(choice.locator("option").count()):
                choice.select_option(index=i)
        for form in ("candidate", "domain", "language"):
            opened.page.locator(f"#text-controls [name={form}]").select_option(index=1)
        assert opened.page.evaluate("window.planted") is None
        assert opened.page.locator("img").count() == 0
        assert PLANTED in opened.page.locator("h1").inner_text()
        assert PLANTED in opened.page.locator("#text-list .prompt").first.inner_text()
        assert PLANTED in opened.page.locator("#text-list mark.other").first.inner_text()
        assert PLANTED in opened.page.locator("#making code").first.inner_text()
        assert "<img src=x" in opened.page.locator("#making h3").first.inner_text()
        ticks = opened.page.locator("#figure-map .xtick text").all_text_contents()
        assert any("</script><script>" in tick and "%{x}&lt;" in tick for tick in ticks), ticks
        # Nor would a script that got in all the same: the page names its own by their hashes.
        opened.page.evaluate(
            "document.body.append(Object.assign(document.createElement('script'),"
            "{textContent: 'window.planted = 1'}))"
        )
        assert opened.page.evaluate("window.planted") is None
        assert len(opened.said) == 1
        assert "Content Security Policy" in opened.said[0]
        assert opened.asked == []


def shown_fdts(opened):
    heads = opened.page.locator("#text-list .text h3 span").all_text_contents()
    return [int(h.split("FDT ")[1].split(" ")[0]) if "FDT" in h else 24 for h in heads]


def test_texts_are_filtered_and_sorted(started, plain):
    with browser.opened(started, plain) as opened:
        form = opened.page.locator("#text-controls")
        form.locator("[name=candidate]").select_option(index=2)
        earliest = shown_fdts(opened)
        assert len(earliest) == 20
        assert earliest == sorted(earliest)
        assert earliest[0] < earliest[-1]
        form.locator("[name=sort]").select_option("late")
        latest = shown_fdts(opened)
        assert latest == sorted(latest, reverse=True)
        opened.page.locator("#text-more").click()
        assert len(shown_fdts(opened)) == 24
        form.locator("[name=domain]").select_option(label="code")
        heads = opened.page.locator("#text-list .text h3 span").all_text_contents()
        assert len(heads) == 12
        assert all("code" in head for head in heads)
        assert opened.page.locator("#text-count").inner_text() == "12 of 24 prompts"
        quiet(opened)


def test_near_ties_are_told_from_real_disagreements(started, plain):
    record = page_records.comparison()
    worst = max(record["candidates"], key=lambda c: c["metrics"]["sdt"]["value"])
    margins = [row["margin"] for row in worst["rows"] if row["margin"] is not None]
    n_ties = sum(margin < 0.1 for margin in margins)
    assert 0 < n_ties < len(margins)
    with browser.opened(started, plain) as opened:
        form = opened.page.locator("#text-controls")
        form.locator("[name=candidate]").select_option(label=worst["name"])
        for kind, n, said in (
            ("tie", n_ties, "near tie"),
            ("real", len(margins) - n_ties, "real disagreement"),
        ):
            form.locator("[name=kind]").select_option(kind)
            labels = opened.page.locator("#text-list h3 b:nth-child(2)").all_text_contents()
            assert labels == [said] * n


def test_both_sides_and_both_probabilities_are_there(started, plain):
    record = page_records.comparison()
    worst = max(record["candidates"], key=lambda c: c["metrics"]["sdt"]["value"])
    example = worst["examples"][0]
    with browser.opened(started, plain) as opened:
        form = opened.page.locator("#text-controls")
        form.locator("[name=candidate]").select_option(label=worst["name"])
        form.locator("[name=sort]").select_option("prompt")
        text = opened.page.locator("#text-list .text", has_text=f"Prompt {example['prompt']}").first
        own = record["prompts"]["completions"][example["prompt"]]
        sides = [pre.text_content() for pre in text.locator(".sides pre").all()]
        assert sides == ["".join(own), example["shared_text"] + example["candidate_text"]]
        assert text.locator("mark.base").text_content() == own[example["fdt"]]
        assert text.locator("mark.other").text_content() == " other"
        cells = text.locator("td").all_text_contents()
        assert cells == ["41.2%", "28.7%", "36.2%", "43.8%"]


def test_hovering_tells_which_component(started, plain):
    with browser.opened(started, plain) as opened:
        place = opened.page.locator("#figure-map")
        place.scroll_into_view_if_needed()
        opened.page.wait_for_selector("#figure-map[data-drawn]")
        box = place.locator(".nsewdrag").bounding_box()
        opened.page.mouse.move(box["x"] + 20, box["y"] + 10)
        hover = place.locator(".hoverlayer text")
        hover.first.wait_for()
        assert "model.layers.0.self_attn.q_proj" in hover.first.text_content()


def test_the_theme_switches_figures_too(started, plain):
    with browser.opened(started, plain, scheme="dark") as opened:
        colour = "getComputedStyle(document.body).backgroundColor"
        opened.page.locator("#figure-survival").scroll_into_view_if_needed()
        opened.page.wait_for_selector("#figure-survival[data-drawn]")
        tick = "getComputedStyle(document.querySelector('#figure-survival .xtick text')).fill"
        dark = opened.page.evaluate(f"[{colour}, {tick}]")
        button = opened.page.locator("#theme")
        button.click()
        assert button.inner_text() == "Theme: light"
        opened.until(f"{tick} !== {dark[1]!r}")
        light = opened.page.evaluate(f"[{colour}, {tick}]")
        assert sum(channels(dark[0])) < 200 < 600 < sum(channels(light[0]))
        assert sum(channels(light[1])) < 200 < 500 < sum(channels(dark[1]))
        button.click()
        assert opened.page.evaluate(colour) == dark[0]
        quiet(opened)


def channels(colour):
    return [int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1400])
def test_nothing_is_wider_than_the_window(started, planted, width, scheme):
    with browser.opened(started, planted, width=width, scheme=scheme) as opened:
        draw_all(opened)
        assert opened.page.evaluate("document.documentElement.scrollWidth") == width


def test_tab_reaches_every_control_and_shows_where_it_is(started, plain):
    with browser.opened(started, plain) as opened:
        reached = set()
        for _ in range(120):
            opened.page.keyboard.press("Tab")
            found = opened.page.evaluate(
                """() => { const e = document.activeElement;
                const s = getComputedStyle(e), name = e.id || e.name || e.className || e.tagName;
                return [name, s.outlineStyle, s.outlineWidth]; }"""
            )
            if found[0] != "BODY":
                assert found[1:] == ["solid", "3px"], found
            reached.add(found[0])
        assert {"theme", "share-0", "view", "candidate", "domain", "sort", "copy"} <= reached


def test_every_control_and_figure_has_a_name_and_figures_a_text(started, plain):
    with browser.opened(started, plain) as opened:
        unnamed = opened.page.evaluate(
            """() => [...document.querySelectorAll('button, select, input, [role], nav')]
            .filter((e) => e.role !== 'status' && !e.ariaLabel && !e.textContent.trim())
            .filter((e) => !(e.labels && e.labels.length))
            .map((e) => e.outerHTML.slice(0, 80))"""
        )
        assert unnamed == []
        unlabelled = opened.page.locator("select:not([aria-label])").evaluate_all(
            "all => all.filter((e) => !e.labels.length).length"
        )
        assert unlabelled == 0
        for figure in opened.page.locator("figure").all():
            assert len(figure.locator("[role=img]").get_attribute("aria-label")) > 40
            assert figure.locator("details table tbody tr").count() > 0
        headings = opened.page.evaluate(
            "[...document.querySelectorAll('h1,h2,h3')].map((e) => Number(e.tagName[1]))"
        )
        assert headings[0] == 1
        assert all(b - a <= 1 for a, b in itertools.pairwise(headings))


def readout(opened, name):
    return opened.page.locator(f".slider [data-value={name}]").inner_text()


def test_the_slider_chooses_as_the_search_does(started, plain):
    sensitivities = read_sensitivities(plain.parent / "sweep.db")
    found = overview(sensitivities)
    harm, size = _options(found["components"], found["schemes"])
    base = int(size[:, 0].sum())
    with browser.opened(started, plain) as opened:
        slider = opened.page.locator(".slider input")
        for percent in (30, 40, 55, 75, 100):
            slider.fill(str(percent))
            share, kl, bytes_ = opened.page.evaluate(
                f"(() => {{ const o = outcome(DATA.sweeps[0], {percent} / 100);"
                "return [o.share, o.kl, o.size]; })()"
            )
            best = least_harm(harm, size, int(base * percent / 100), prove=True)
            assert bytes_ <= base * percent / 100
            assert share == pytest.approx(bytes_ / base)
            assert best.lower_bound * (1 - 1e-9) <= kl <= best.harm * 1.05 + 1e-12
            assert readout(opened, "size").startswith(f"{bytes_ / 1e6:.1f} MB")
        quiet(opened)


def test_what_the_slider_expects_is_what_the_law_says(started, plain):
    from divergent_tokens.measure.flips import UNFITTED, predict

    sensitivities = read_sensitivities(plain.parent / "sweep.db")
    with browser.opened(started, plain) as opened:
        for kl in (3e-5, 1e-3, 0.02, 0.2):
            got = opened.page.evaluate(f"expectedAt(DATA.sweeps[0].table, {kl})")
            wanted = predict(sensitivities.margins, kl, UNFITTED)
            values = [
                bound
                for one in (wanted.sdt, wanted.fdt)
                for bound in (one.value, one.low, one.high)
            ]
            assert got == pytest.approx(values, rel=0.05, abs=0.01)
        assert opened.page.evaluate("expectedAt(DATA.sweeps[0].table, 0.31)") is None


def test_the_slider_moves_by_keyboard_and_marks_the_figure(started, plain):
    with browser.opened(started, plain) as opened:
        slider = opened.page.locator(".slider input")
        slider.focus()
        opened.page.wait_for_selector("#figure-budget[data-drawn]")
        before = readout(opened, "kl"), slider.get_attribute("aria-valuetext")
        for _ in range(40):
            opened.page.keyboard.press("ArrowLeft")
        after = readout(opened, "kl"), slider.get_attribute("aria-valuetext")
        assert before[0] != after[0]
        assert before[1] != after[1]
        ring = "document.getElementById('figure-budget').data.find((t) => t.meta === 'slider').x[0]"
        opened.until(f"Math.abs({ring} - 0.56) < 0.02")


def test_a_command_is_copied(started, plain):
    with browser.opened(started, plain) as opened:
        opened.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        opened.page.locator("button.copy").first.click()
        opened.until("document.querySelector('button.copy').textContent === 'Copied'")
        pasted = opened.page.evaluate("navigator.clipboard.readText()")
        assert pasted == "dtm compare tiny --scheme 'candidate 0'"


def test_numbers_are_written_as_in_the_tables(started, plain):
    from divergent_tokens.report.numbers import number

    values = [52.3456, 0.020182, 0.00282577, 9.9999, 0, 123456.0, 0.5]
    with browser.opened(started, plain) as opened:
        got = opened.page.evaluate(f"{values}.map((value) => number(value))")
    assert got == [number(value) for value in values]
