// Shows a picture with its label map: opacity, classes on and off, the class under the pointer.
// `props.value` is {message, wrong} or also {picture, labels, width, height, wide, classes}; see `shown` of page.py.
const find = (name) => element.querySelector("." + name);
const state = { value: null, picture: null, labels: null, hidden: new Set() };
let drawing = 0; // number of the newest value: an older one that is still being decoded is dropped

async function decoded(value) {
  const bytes = Uint8Array.from(atob(value.labels), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  return value.wide ? new Uint16Array(buffer) : new Uint8Array(buffer);
}

async function loaded(address) {
  const picture = new Image();
  picture.src = address;
  await picture.decode();
  return picture;
}

function draw() {
  const { value, picture, labels, hidden } = state;
  const canvas = find("view");
  canvas.width = value.width;
  canvas.height = value.height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(picture, 0, 0, value.width, value.height);
  const pixels = context.getImageData(0, 0, value.width, value.height);
  const opacity = find("opacity").value / 100;
  const colors = new Map(value.classes.filter((c) => !hidden.has(c.index)).map((c) => [c.index, c.color]));
  for (let i = 0; i < labels.length; i++) {
    const color = colors.get(labels[i]);
    if (!color) continue;
    for (let k = 0; k < 3; k++) {
      const at = 4 * i + k;
      pixels.data[at] += opacity * (color[k] - pixels.data[at]);
    }
  }
  context.putImageData(pixels, 0, 0);
}

function listed() {
  const list = find("legend");
  list.replaceChildren(
    ...state.value.classes.map((entry) => {
      const row = document.createElement("li"), label = document.createElement("label");
      const box = document.createElement("input"), swatch = document.createElement("span");
      const name = document.createElement("span"), share = document.createElement("span");
      box.type = "checkbox";
      box.checked = !state.hidden.has(entry.index);
      box.addEventListener("change", () => {
        state.hidden[box.checked ? "delete" : "add"](entry.index);
        draw();
      });
      swatch.className = "swatch";
      swatch.style.background = `rgb(${entry.color.join()})`;
      name.textContent = entry.class; // text, never markup: names come from files
      share.className = "share";
      share.textContent = (100 * entry.share).toFixed(1) + " %";
      label.dataset.index = entry.index;
      label.append(box, swatch, name, share);
      row.append(label);
      return row;
    }),
  );
}

function pointed(event) {
  const canvas = find("view"), box = canvas.getBoundingClientRect(), { value } = state;
  const scale = Math.min(box.width / value.width, box.height / value.height); // object-fit: contain
  const x = Math.floor((event.clientX - box.left - (box.width - value.width * scale) / 2) / scale);
  const y = Math.floor((event.clientY - box.top - (box.height - value.height * scale) / 2) / scale);
  const inside = x >= 0 && y >= 0 && x < value.width && y < value.height;
  const entry = inside && value.classes.find((c) => c.index === state.labels[y * value.width + x]);
  const sign = find("pointed");
  sign.hidden = !entry;
  for (const label of element.querySelectorAll(".legend label"))
    label.classList.toggle("here", Boolean(entry) && Number(label.dataset.index) === entry.index);
  if (!entry) return;
  sign.textContent = entry.class;
  const left = event.clientX - box.left, top = event.clientY - box.top;
  sign.style.left = Math.min(left + 12, box.width - sign.offsetWidth) + "px";
  sign.style.top = Math.max(top - sign.offsetHeight - 8, 0) + "px";
}

function choose(hidden) {
  state.hidden = new Set(hidden);
  listed();
  draw();
}

async function show() {
  const value = props.value || {}, number = ++drawing;
  find("message").textContent = value.message || "";
  find("message").classList.toggle("wrong", Boolean(value.wrong));
  find("message").classList.toggle("empty", !value.picture);
  // What was refused may be no picture: the browser would show the sign of a broken one.
  for (const given of document.querySelectorAll("#picture img")) given.style.display = value.wrong ? "none" : "";
  find("result").hidden = true;
  find("pointed").hidden = true;
  if (!value.picture) return;
  let picture, labels;
  try {
    [picture, labels] = await Promise.all([loaded(value.picture), decoded(value)]);
  } catch (error) {
    find("message").textContent = "This browser cannot show the result: " + error.message;
    find("message").classList.add("wrong");
    return;
  }
  if (number !== drawing) return;
  Object.assign(state, { value, picture, labels, hidden: new Set() });
  for (const [kind, ending] of [["as-shown", "_overlay.png"], ["index", "_index.png"], ["json", ".json"]]) {
    find(kind).download = value.name + ending;
    find(kind).href = value[kind] || "#";
  }
  listed();
  draw();
  find("result").hidden = false;
}

find("opacity").addEventListener("input", draw);
find("all").addEventListener("click", () => choose([]));
find("none").addEventListener("click", () => choose(state.value.classes.map((c) => c.index)));
find("as-shown").addEventListener("click", (event) => (event.currentTarget.href = find("view").toDataURL("image/png")));
find("view").addEventListener("pointermove", pointed);
find("view").addEventListener("pointerleave", () => {
  find("pointed").hidden = true;
  element.querySelectorAll(".legend .here").forEach((label) => label.classList.remove("here"));
});
watch("value", show);
show();
