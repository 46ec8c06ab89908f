"use strict";
// The page is whole without this: it only chooses, sorts and enlarges what is there.

const byId = (id) => document.getElementById(id);
const gallery = byId("gallery");
const runChoice = byId("run");
const orderChoice = byId("order");

function scoreOf(tile) {
  const run = runChoice.value === "all" ? 0 : Number(runChoice.value);
  return Number(tile.dataset.mcc.split(" ")[run]);
}

const orders = {
  worst: (a, b) => scoreOf(a) - scoreOf(b),
  best: (a, b) => scoreOf(b) - scoreOf(a),
  glacier: (a, b) => Number(b.dataset.glacier) - Number(a.dataset.glacier),
  id: (a, b) => (a.dataset.tile < b.dataset.tile ? -1 : 1),
};

function arrange() {
  for (const figure of gallery.querySelectorAll("figure[data-run]")) {
    figure.hidden = runChoice.value !== "all" && figure.dataset.run !== runChoice.value;
  }
  const tiles = [...gallery.children].sort(orders[orderChoice.value]);
  for (const tile of tiles) {
    tile.querySelector(".mcc").textContent = "MCC " + scoreOf(tile).toFixed(3);
  }
  gallery.append(...tiles);
}

runChoice.addEventListener("change", arrange);
orderChoice.addEventListener("change", arrange);
runChoice.form.hidden = false;
arrange();

// --- Enlarged pictures ---------------------------------------------------------------------------

const viewer = byId("viewer");
let shown = [];
let place = 0;

function show() {
  const picture = shown[place].cloneNode();
  byId("viewer-picture").replaceChildren(picture);
  byId("viewer-title").textContent = picture.alt;
}

function step(by) {
  place = (place + by + shown.length) % shown.length;
  show();
}

gallery.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  shown = [...button.closest(".tile").querySelectorAll("figure:not([hidden]) img")];
  place = shown.indexOf(button.querySelector("img"));
  show();
  viewer.showModal();
});
viewer.addEventListener("click", (event) => {
  if (event.target.dataset.step) step(Number(event.target.dataset.step));
  if (event.target.id === "viewer-close" || event.target === viewer) viewer.close();
});
viewer.addEventListener("keydown", (event) => {
  if (event.key === "ArrowRight") step(1);
  if (event.key === "ArrowLeft") step(-1);
});
