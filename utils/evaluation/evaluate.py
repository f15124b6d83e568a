"""The evaluation of a run on a domain."""

import csv
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import FIELD_PX, RUNTIME_SETTINGS, pixel_mm
from utils import plots
from utils.data.dataset import DatasetInfo
from utils.data.loaders import scan_loader
from utils.data.prepared import PreparedData
from utils.data.volume import PROGRAM, PlaneMap, Volume, read_volume, write_volume
from utils.evaluation.confidence import Uncertainty
from utils.evaluation.metrics import (
    METRICS,
    agreement_limits,
    largest_components,
    mean_std_interval,
    pooled_dice,
    structure_metrics,
)
from utils.evaluation.predict import ScanPrediction, mean_dice, predict_scans
from utils.evaluation.report import cases_table, summary_tables, summary_text, write_report
from utils.evaluation.runs import TrainedRun, is_other, method_name, patients_to_evaluate
from utils.evaluation.tables import Cell, count
from utils.files import OutputFolder, require_writable, write_json
from utils.run.checkpoint import provenance
from utils.run.folder import unfinished

RESULT_FILES = ("summary.json", "summary.md", "per_case.csv", "report.html")
CASE_COLUMNS = ("patient", "phase", "structure", *METRICS)
CASE_COLUMNS += ("missed", "predicted_ml", "truth_ml", "paper_dice")
SLICES_DRAWN = 6  # of a scan, at most


def evaluate_run(
    run: TrainedRun, dataset: DatasetInfo, data: PreparedData, out: Path, *, domain: str,
    title: str, save_predictions=False, keep_largest=False, labels: Sequence[str] = (),
) -> dict:  # fmt: skip
    """Evaluate a run on a domain's patients with masks, into `out`; return summary.json, with the user's `labels`."""
    remark, patients = unfinished(run.folder), patients_to_evaluate(run, data, domain)
    outputs = OutputFolder(out)
    outputs.require_free(*RESULT_FILES)
    require_writable(out, "--out or --output")
    slice_dice, cases, drawings, overlaps = [], [], {}, defaultdict(int)
    uncertainty, loader = Uncertainty(), scan_loader(data, patients)
    scans = predict_scans(run.predictor, loader, data, confidence=True)
    for scan in tqdm(scans, f"evaluate {run.folder.name}", len(loader), leave=False, unit="scan"):
        options = {"field": run.config.field, "keep_largest": keep_largest}
        segmented, truth, rows = to_native(scan, data, dataset.class_names, **options)
        slice_dice.append((scan.patient, scan.phase, scan.slice_dice.tolist()))
        cases += rows
        overlaps[scan.patient] = overlaps[scan.patient] + scan.overlap
        uncertainty.add(scan)
        drawings[scan.patient, scan.phase] = case_drawing(scan, truth)
        if save_predictions:
            name = f"predictions/{scan.patient}_{scan.phase}.nii.gz"
            write_volume(outputs.claim(name), segmented, truth, PROGRAM)
    paper_dice = mean_dice(slice_dice)
    cases = [{**case, "paper_dice": paper_dice[case["patient"]]} for case in cases]
    number = len(paper_dice)
    few = [f"{count(number, 'patient')}: an interval over fewer than 6 says little"] if number < 6 else []
    voxels, outside = (sum(case[key] for case in cases) for key in ("voxels", "outside_field"))
    summary = {
        **run_facts(run),
        "data": data.name,
        "dataset": dataset.key,
        "test_domain": domain,
        "checkpoint": f"{run.checkpoint}, step {run.metadata['step']}{remark}",
        "unfinished": remark,
        "other_data": is_other(run.metadata, data.info),
        "keep_largest": keep_largest,
        "patients": number,
        "paper_dice": paper_dice,
        "paper_protocol": mean_std_interval([*paper_dice.values()]),
        "pooled": pooled_dice(np.array([*overlaps.values()]), dataset.class_names[1:]),
        "volumetric": {name: volumetric_figures(cases, name) for name in dataset.class_names[1:]},
        "outside_field_percent": 100 * outside / max(voxels, 1),
        **{key: data.info[key] for key in ("phantom", "open_data", "content_hash")},
        **uncertainty.summary(),
        "labels": list(labels),
        "warnings": exchanged_phases(cases, dataset) + few,
        "clinical": clinical_figures(cases, dataset),
    }
    tables = summary_tables(summary)
    write_json(outputs.claim("summary.json"), summary)
    outputs.claim("summary.md").write_text(summary_text(title, summary, tables), encoding="utf-8")
    with open(outputs.claim("per_case.csv"), "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, CASE_COLUMNS, extrasaction="ignore")
        table.writeheader()
        table.writerows(cases)
    heading = f"{title}: run {summary['run']}, data {data.name}"
    pictures = draw_overlays(outputs, dataset, summary, drawings, heading)
    pictures += [("Training", path) for path in run.folder.glob("curves.png")]
    write_report(
        outputs.claim("report.html"), title=title, summary=summary, tables=tables,
        config=asdict(run.config), cases=cases_table(cases), pictures=pictures,
    )  # fmt: skip
    outputs.remove_stale()
    paper = Cell(**summary["paper_protocol"])._replace(ci95=None)
    volumetric = [f"{name} {Cell(s['dice'])}" for name, s in summary["volumetric"].items()]
    for text in summary["warnings"]:
        print(f"warning: {text}")
    print(f"{run.folder}: {title}: paper Dice {paper} % of {count(number, 'patient')}; "
          f"volumetric Dice (%) {', '.join(volumetric)}; report in {out / 'report.html'}")  # fmt: skip
    return summary


def run_facts(run: TrainedRun) -> dict:
    """Return what summary.json says about the run itself."""
    settings = {k: value for k, value in asdict(run.config).items() if k not in RUNTIME_SETTINGS}
    labeled = Counter(run.metadata["labeled"].values())
    selection = {"best": run.metadata["selection"], "last": "none, the training's last state"}
    return {
        "run": run.folder.resolve().name,
        "selection": selection.get(run.checkpoint, "none, a kept epoch"),
        "method": method_name(run.metadata),
        "settings": settings,
        **{key: settings[key] for key in ("ratio", "seed", "image_size")},
        "tta": run.predictor.tta,
        "step": run.metadata["step"],
        "labeled": ", ".join(f"{d} {n}" for d, n in sorted(labeled.items())) or "unknown",
        "trained_by": {key: run.metadata[key] for key in ("git_commit", "versions", "content_hash")},
        "evaluated_by": provenance(),
    }


def to_native(
    scan: ScanPrediction, data: PreparedData, class_names: Sequence[str], *, field=FIELD_PX, keep_largest=False
) -> tuple[np.ndarray, Volume, list[dict]]:
    """Map a prediction to its scan's grid (bilinear softmax, argmax, largest components); score it.

    Return labels (X, Y, Z) uint8, the truth's file, and by structure `structure_metrics`, volumes
    (ml), and the truth's voxels, in all and outside the field of view.
    """
    truth, size = read_volume(data.truth_path(scan.patient, scan.phase), 3), scan.image.shape[-1]
    pixel = pixel_mm(data.info["spacing_mm"], size, field)
    plane = PlaneMap(truth.array.shape[:2], truth.zooms[:2], size, pixel)
    softmax = scan.probability.float().cpu().numpy()  # its map of all slices would take gigabytes
    labels = np.stack([plane.to_native(p).argmax(0).astype(np.uint8) for p in softmax], axis=-1)
    labels = largest_components(labels) if keep_largest else labels
    voxel_ml, rows = float(np.prod(truth.zooms)) / 1000, []
    for label, name in enumerate(class_names[1:], start=1):
        masks = labels == label, truth.array == label
        predicted, voxels = map(np.count_nonzero, masks)
        row = {"patient": scan.patient, "phase": scan.phase, "structure": name}
        row |= structure_metrics(*masks, truth.zooms)
        row |= {"voxels": voxels, "outside_field": np.count_nonzero(masks[1][~plane.inside()])}
        rows.append(row | {"predicted_ml": predicted * voxel_ml, "truth_ml": voxels * voxel_ml})
    return labels, truth, rows


def volumetric_figures(cases: Sequence[dict], structure: str) -> dict:
    """Return one structure's metrics: means over patients, of means over their scans."""
    scans = [case for case in cases if case["structure"] == structure]
    figures = {"missed": sum(case.get("missed", 0) for case in scans), "scans": len(scans)}
    figures["both_empty"] = sum("dice" not in case for case in scans)
    for metric in METRICS:
        patients: dict[str, list[float]] = defaultdict(list)
        for case in scans:
            if metric in case:
                patients[case["patient"]].append(case[metric])
        spread = mean_std_interval([np.mean(values) for values in patients.values()])
        figures |= {metric: spread["mean"], f"{metric}_std": spread["std"], f"{metric}_ci95": spread["ci95"]}
    return figures


def clinical_figures(cases: Sequence[dict], dataset: DatasetInfo) -> dict[str, dict]:
    """Return `agreement_limits` with "unit" by clinical quantity, of patients with ED and ES."""
    pairs = defaultdict(lambda: ([], []))
    for patient in dict.fromkeys(case["patient"] for case in cases if dataset.clinical):
        scans = [case for case in cases if case["patient"] == patient]
        if {"ED", "ES"} <= {case["phase"] for case in scans}:
            for column, kind in enumerate(("truth_ml", "predicted_ml")):
                volumes = {(case["phase"], case["structure"]): case[kind] for case in scans}
                for name, (value, unit) in dataset.clinical(volumes).items():
                    pairs[name, unit][column].append(value)
    return {name: agreement_limits(*pairs[name, unit]) | {"unit": unit} for name, unit in pairs}


def exchanged_phases(cases: Sequence[dict], dataset: DatasetInfo) -> list[str]:
    """Return a warning per patient whose first structure, the LV, is larger in the truth at ES."""
    names = dataset.class_names[1:2] if dataset.clinical else ()
    ml = {(c["patient"], c["phase"]): c["truth_ml"] for c in cases if c["structure"] in names}
    patients = [p for p, phase in ml if phase == "ED" and ml[p, "ED"] < ml.get((p, "ES"), 0)]
    return [f"{patient}: the true {names[0]} is larger at ES than at ED: exchanged?" for patient in patients]


def case_drawing(scan: ScanPrediction, grid: Volume) -> dict:
    """Return what `plot_case` draws: few slices, cropped, as those of all scans stay in memory."""
    last, window = len(scan.rows) - 1, ()
    slices = np.unique(np.linspace(0, last, SLICES_DRAWN).round().astype(int)).tolist()
    arrays = {"image": scan.image, "agreement": scan.agreement}
    arrays |= {"truth": scan.truth, "prediction": scan.probability.argmax(1)}
    for name, values in arrays.items():
        arrays[name] = plots.radiological(values[slices].float().cpu().numpy(), grid)
    places = np.argwhere((arrays["truth"] + arrays["prediction"]).any(0))  # of structures
    if len(places):
        low, high = places.min(0), places.max(0) + 1
        middle, half = (low + high) // 2, int(0.85 * (high - low).max()) + 1
        window = tuple(map(slice, np.maximum(middle - half, 0), middle + half))
    arrays = {name: array[:, *window].astype(np.float16) for name, array in arrays.items()}
    return {**arrays, "slices": slices, "letters": plots.edge_letters(grid)}


def draw_overlays(
    outputs: OutputFolder, dataset: DatasetInfo, summary: dict, drawings: dict, title: str
) -> list[tuple[str, Path]]:
    """Draw worst, median and best patient; return captions and files, for the report."""
    paper_dice, pictures = summary["paper_dice"], []
    ranked = sorted(paper_dice, key=paper_dice.__getitem__)
    ranks = {ranked[len(ranked) // 2]: "median", ranked[-1]: "best", ranked[0]: "worst"}
    spacing = pixel_mm(dataset.spacing, summary["image_size"], summary["settings"]["field"])
    for patient, phase in sorted(drawings, key=lambda key: paper_dice[key[0]]):
        if rank := ranks.get(patient):
            caption = f"{rank} patient: {patient} {phase}; paper Dice {paper_dice[patient]:.1f} %"
            path = outputs.claim(f"overlays/{rank}_{patient}_{phase}.png")
            text = {"class_names": dataset.class_names[1:], "title": f"{caption}\n{title}"}
            plots.plot_case(path, **drawings[patient, phase], **text, spacing=spacing)
            pictures.append((caption, path))
    return pictures
