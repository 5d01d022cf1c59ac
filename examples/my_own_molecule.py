"""From an xyz file to dynamics under a potential trained for it: label, train, evaluate, run.

python examples/my_own_molecule.py [structure.xyz] [frames] [training steps] [dynamics steps]

Needs the labelling engine: pip install "ffpretrain[label]". Stop it at any time: called again, it goes on
with the labels and the training where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ffpretrain import load_potential
from ffpretrain.datasets import open_dataset
from ffpretrain.datasets.engines import open_engine
from ffpretrain.datasets.label import label_dataset
from ffpretrain.datasets.splits import load_splits
from ffpretrain.errors import MissingDependencyError
from ffpretrain.evaluation import error_table, predict
from ffpretrain.md import simulate
from ffpretrain.recipes import load_recipe
from ffpretrain.training import train

structure = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).with_name("methanol.xyz"))
frames = int(sys.argv[2]) if len(sys.argv) > 2 else 200
steps = int(sys.argv[3]) if len(sys.argv) > 3 else 1500
dynamics_steps = int(sys.argv[4]) if len(sys.argv) > 4 else 4000
try:
    open_engine("gfn2")
except MissingDependencyError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
run = Path("my-molecule")
run.mkdir(exist_ok=True)

# 1. geometries from GFN2-xTB dynamics at 500 K, with energies and forces
labels = run / "labels.h5"
label_dataset(structure, labels, engine="gfn2", n=frames, temperature=500.0, progress=True)

# 2. a small network, trained on 80 % of the frames; 10 % choose the best weights, 10 % stay unseen
recipe = load_recipe("finetune-own", {"trainer.max_steps": steps}, data=labels)
begun = (run / "training" / "checkpoints" / "last.ckpt").is_file()
model = train(recipe, run / "training", resume=begun, overwrite=not begun)

# 3. errors on the frames that neither training nor selection has seen
dataset = open_dataset(labels)
unseen = load_splits(run / "training" / "splits.json", dataset).apply(dataset)["test"]
for name, error in error_table(predict(load_potential(model), unseen)).items():
    print(f"{name}: {error.value:.4g} {error.unit}")

# 4. two picoseconds at 300 K
folder = run / "dynamics"
result = simulate(structure, model, temperature=300.0, steps=dynamics_steps, out=folder, overwrite=True)
print(f"{result.summary['temperature']['mean']:.0f} K on average; look: ase gui {result.paths['trajectory']}")
