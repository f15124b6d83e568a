"""The report as a browser would read it: what it shows, what it would load, and that nothing in it can act."""

import base64
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.image import imsave

from utils.evaluation.report import cases_table, summary_tables, summary_text, write_report
from utils.evaluation.tables import MARKS

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>&amp;'
METRICS = {"dice": 87.125, "hd95": 9.5, "assd": 1.25}
SPREADS = {f"{name}_ci95": None for name in METRICS} | {"dice_ci95": [85.0, 90.0]}
RISK = {"number": 9, "exp(−V)": 22.0, "agreement": 20.0, "softmax maximum": 21.0, "random": 25.0, "best possible": 10.0}
COUNTS = {"missed": 1, "both_empty": 2, "scans": 4}


class Page(HTMLParser):
    """Tags with their attributes, and the text outside the style sheet; tables as lists of lines."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.style, self.tables, self.open = [], "", "", [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open = tag
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        self.open = None

    def handle_data(self, data):
        if self.open == "style":
            self.style += data
            return
        self.text += data
        if self.open in ("td", "th"):
            self.tables[-1][-1][-1] += data

    def attributes(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def arguments(tmp_path):
    pictures = [(f"Picture {i}", tmp_path / f"{i}.png") for i in range(2)]
    for seed, (_, path) in enumerate(pictures):
        imsave(path, np.random.default_rng(seed).random((8, 9)))
    cases = [
        {"patient": patient, "phase": phase, "structure": name, "paper_dice": paper, **METRICS}
        for patient, paper in (("good", 90.0), ("bad", 40.0))
        for phase in ("ED", "ES")
        for name in ("LV", "RV")
    ]
    facts = {"run": "first", "data": "mms", "patients": 2, "ratio": 0.02, "seed": 7, "image_size": 288}
    facts |= {"method": "plain CPS", "checkpoint": "best, step 3", "selection": "highest Dice"}
    facts |= {"labels": ["200=LV"], "warnings": []}
    facts |= dict.fromkeys(MARKS, False) | {"dataset": "mms", "test_domain": "D", "labeled": "A 3, B 6", "step": 3}
    facts["settings"] = {
        "labeled_patients": None,
        "num_epoch": 50,
        "max_steps": None,
        "pretrained": "timm",
        "field": 288,
    }
    facts |= {"content_hash": "abc123", "evaluated_by": {"git_commit": "badcab1e"}}
    return {
        "title": "M&Ms, held-out vendor D",
        "summary": {
            **facts,
            "paper_protocol": {"mean": 65.0, "std": 35.3553, "ci95": [40.0, 90.0]},
            "pooled": {
                "LV": 88.0,
                "RV": 86.0,
                "mean": 87.0,
                "ci95": {key: [80.0, 90.0] for key in ("LV", "RV", "mean")},
            },
            "volumetric": {name: {**METRICS, **SPREADS, **COUNTS} for name in ("LV", "RV")},
            "outside_field_percent": 0.5,
            "clinical": {},
            "calibration": {"field of view": {"ece": 1.5}, "foreground": {"ece": None}},
            "risk": {"slices": RISK},
            "trained_by": {"git_commit": "c0ffee", "versions": {"torch": "2.10"}},
        },
        "config": {"data_root": "data/mms", "flip": True, "max_steps": None},
        "cases": cases,
        "pictures": pictures,
    }


@pytest.fixture
def report(tmp_path, arguments):
    """Write the report, with some arguments changed, and parse it."""

    def write(**changes):
        given = arguments | changes
        given |= {"tables": summary_tables(given["summary"]), "cases": cases_table(given["cases"])}
        write_report(tmp_path / "report.html", **given)
        return Page((tmp_path / "report.html").read_text(encoding="utf-8"))

    return write


def test_nothing_is_loaded_from_elsewhere_and_a_missing_picture_is_named(report, arguments, tmp_path):
    pictures = [("Curves", tmp_path / "curves.png"), *arguments["pictures"]]
    page = report(config={"path": "http://example.org/x.png", "other": "file:///etc"}, pictures=pictures)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base")
        for name in ("src", "href", "srcset", "action", "data", "style", "background"):
            assert attributes.get(name, "data:").startswith("data:")
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in page.style and "@import" not in page.style
    [policy] = [a["content"] for a in page.attributes("meta") if "http-equiv" in a]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

    assert "Curves: no picture, curves.png is not there." in page.text
    images = page.attributes("img")
    assert [image["alt"] for image in images] == ["Picture 0", "Picture 1"]
    for image, (_, path) in zip(images, arguments["pictures"], strict=True):
        assert image["src"] == f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def test_values_are_there(report):
    page = report()
    setting = (
        "Run first, data mms. 2 patients; labelled A 3, B 6 (2 %); seed 7, 288 px. "
        "Method: plain CPS. Checkpoint: best, step 3; selection: highest Dice."
    )
    for text in (setting, "M&Ms, held-out vendor D", "For research use, not for clinical decisions.", "abc123",
                 "Dice (%) 65.00 ± 35.36 [40.00, 90.00]", "0.50 % of the labelled voxels lie outside",
                 '"data_root": "data/mms"', '"max_steps": null', '"git_commit": "c0ffee"', "badcab1e"):  # fmt: skip
        assert text in page.text
    # The cases from the worst to the best.
    volumetric, pooled, published, later, calibration, risk, (header, *cases) = page.tables
    assert pooled[1:] == [
        ["LV", "88.00 [80.00, 90.00]"],
        ["RV", "86.00 [80.00, 90.00]"],
        ["mean", "87.00 [80.00, 90.00]"],
    ]
    assert published[1] == ["this run", "65.00 ± 35.36", "patients", "as noted"]
    assert ["VDPL (U-Net)", "85.42", "–", "labelled source"] in published and len(later) == 3
    assert "This run is not comparable: plain CPS." in page.text
    assert calibration[1:] == [["field of view", "1.50"], ["foreground", "–"]]
    assert risk[1] == ["slices", "9", "22.00", "20.00", "21.00", "25.00", "10.00"]
    assert volumetric[1] == ["LV", "87.12 [85.00, 90.00]", "9.50", "1.25", "1", "2", "4"]
    assert header[2:4] == ["patient's paper Dice (%)", "LV Dice (%)"] and header[-1] == "RV ASSD (mm)"
    assert cases[0] == ["bad", "ED", "40.00", "87.12", "87.12", "9.50", "9.50", "1.25", "1.25"]
    assert [case[:2] for case in cases[1:]] == [["bad", "ES"], ["good", "ED"], ["good", "ES"]]


def test_markdown_says_the_same(report, arguments):
    summary = arguments["summary"] | {"phantom": True, "tta": True, "keep_largest": True}
    text = summary_text(arguments["title"], summary, summary_tables(summary))
    for expected in ("# M&Ms, held-out vendor D\n",
                     "seed 7, 288 px, phantom data, test-time augmentation, largest components. ",
                     "**Phantom data: these numbers say nothing about real scans.**",
                     "Dice (%) 65.00 ± 35.36 [40.00, 90.00]",
                     "\n| LV | 87.12 [85.00, 90.00] | 9.50 | 1.25 | 1 | 2 | 4 |\n"):  # fmt: skip
        assert expected in text
    assert "Phantom data: these" in report(summary=summary).text
    assert "Phantom" not in summary_text(arguments["title"], arguments["summary"], []) + report().text


def test_hostile_values_are_only_text(report, arguments, tmp_path):
    summary = arguments["summary"] | {key: HOSTILE for key in ("checkpoint", "selection", "seed", "content_hash")}
    summary["volumetric"] = {HOSTILE: arguments["summary"]["volumetric"]["LV"]}
    quantity = dict.fromkeys(("truth_mean", "predicted_mean", "bias", "sd", "mae"), 1.0)
    quantity |= {"unit": HOSTILE, "n": HOSTILE} | dict.fromkeys(("bias_ci95", "mae_ci95", "limits"))
    summary["clinical"] = {HOSTILE: quantity}
    case = {"patient": HOSTILE, "phase": HOSTILE, "structure": HOSTILE, "paper_dice": 1.0}
    pictures = [(HOSTILE, arguments["pictures"][0][1]), (HOSTILE, tmp_path / HOSTILE.replace("/", "_"))]
    config = {HOSTILE: HOSTILE, "surrogate": "\udce9"}
    page = report(title=HOSTILE, summary=summary, config=config, cases=[case], pictures=pictures)
    assert not page.attributes("script") and len(page.attributes("img")) == 1
    assert page.attributes("img")[0]["alt"] == HOSTILE
    assert page.tables[-1][1][:2] == [HOSTILE, HOSTILE] and page.tables[4][1][:2] == [f"{HOSTILE} ({HOSTILE})", HOSTILE]
    # title and heading, 3 facts, structure, quantity, unit, n, structure again, header of 3 columns, patient, phase,
    # 2 captions; the setting's name and value, the hash: each as it was given
    assert page.text.count(HOSTILE) == 2 + 3 + 3 + 1 + 3 + 2 + 2 + 3
