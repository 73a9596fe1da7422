// Shows an image with its label map: opacity, visible classes, class name at the pointer.
// `props.value` is the dict of `viewer_value` in page.py or, without a result, {message, failed}.
const find = (name) => element.querySelector("." + name);
const state = { value: null, image: null, labels: null, hidden: new Set() };
let version = 0; // number of the newest value; an older value whose decoding ends later is not shown

async function decodeLabels(value) {
  const bytes = Uint8Array.from(atob(value.labels), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  return value.wide ? new Uint16Array(buffer) : new Uint8Array(buffer);
}

async function loadImage(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  return image;
}

function draw() {
  const { value, image, labels, hidden } = state;
  const canvas = find("view");
  canvas.width = value.width;
  canvas.height = value.height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0, value.width, value.height);
  const pixels = context.getImageData(0, 0, value.width, value.height);
  const opacity = find("opacity").value / 100;
  const colors = new Map(value.classes.filter((c) => !hidden.has(c.index)).map((c) => [c.index, c.color]));
  for (let i = 0; i < labels.length; i++) {
    const color = colors.get(labels[i]);
    if (!color) continue;
    for (let k = 0; k < 3; k++) {
      const offset = 4 * i + k;
      pixels.data[offset] += opacity * (color[k] - pixels.data[offset]);
    }
  }
  context.putImageData(pixels, 0, 0);
}

function drawLegend() {
  find("legend").replaceChildren(
    ...state.value.classes.map((entry) => {
      const [row, label, checkbox, swatch, name, fraction] =
        ["li", "label", "input", "span", "span", "span"].map((tag) => document.createElement(tag));
      checkbox.type = "checkbox";
      checkbox.checked = !state.hidden.has(entry.index);
      checkbox.addEventListener("change", () => {
        state.hidden[checkbox.checked ? "delete" : "add"](entry.index);
        draw();
      });
      swatch.className = "swatch";
      swatch.style.background = `rgb(${entry.color.join()})`;
      name.textContent = entry.class; // not innerHTML: class names come from files
      fraction.className = "fraction";
      fraction.textContent = (100 * entry.fraction).toFixed(1) + " %";
      label.dataset.index = entry.index;
      label.append(checkbox, swatch, name, fraction);
      row.append(label);
      return row;
    }),
  );
}

function showTooltip(event) {
  const box = find("view").getBoundingClientRect(), { value } = state;
  const scale = Math.min(box.width / value.width, box.height / value.height); // object-fit: contain
  const x = Math.floor((event.clientX - box.left - (box.width - value.width * scale) / 2) / scale);
  const y = Math.floor((event.clientY - box.top - (box.height - value.height * scale) / 2) / scale);
  const inside = x >= 0 && y >= 0 && x < value.width && y < value.height;
  const entry = inside && value.classes.find((c) => c.index === state.labels[y * value.width + x]);
  const tooltip = find("tooltip");
  tooltip.hidden = !entry;
  for (const label of element.querySelectorAll(".legend label"))
    label.classList.toggle("hovered", Boolean(entry) && Number(label.dataset.index) === entry.index);
  if (!entry) return;
  tooltip.textContent = entry.class;
  const left = event.clientX - box.left, top = event.clientY - box.top;
  tooltip.style.left = Math.min(left + 12, box.width - tooltip.offsetWidth) + "px";
  tooltip.style.top = Math.max(top - tooltip.offsetHeight - 8, 0) + "px";
}

function hideTooltip() {
  find("tooltip").hidden = true;
  element.querySelectorAll(".legend .hovered").forEach((label) => label.classList.remove("hovered"));
}

function hideClasses(indices) {
  state.hidden = new Set(indices);
  drawLegend();
  draw();
}

async function show() {
  const value = props.value || {}, current = ++version;
  find("message").textContent = value.message || "";
  find("message").classList.toggle("failed", Boolean(value.failed));
  find("message").classList.toggle("empty", !value.image);
  // Hide the preview of a file that is not an image, because browsers show a broken-image icon.
  for (const preview of document.querySelectorAll("#image img")) preview.style.display = value.failed ? "none" : "";
  find("result").hidden = true;
  find("tooltip").hidden = true;
  if (!value.image) return;
  let image, labels;
  try {
    [image, labels] = await Promise.all([loadImage(value.image), decodeLabels(value)]);
  } catch (error) {
    find("message").textContent = "This browser cannot show the result: " + error.message;
    find("message").classList.add("failed");
    return;
  }
  if (current !== version) return;
  Object.assign(state, { value, image, labels });
  for (const [kind, suffix] of [["overlay", "_overlay.png"], ["index", "_index.png"], ["json", ".json"]]) {
    find(kind).download = value.name + suffix;
    find(kind).href = value[kind] || "#";
  }
  hideClasses([]);
  find("result").hidden = false;
}

find("opacity").addEventListener("input", draw);
find("all").addEventListener("click", () => hideClasses([]));
find("none").addEventListener("click", () => hideClasses(state.value.classes.map((c) => c.index)));
find("overlay").addEventListener("click", (event) => (event.currentTarget.href = find("view").toDataURL("image/png")));
find("view").addEventListener("pointermove", showTooltip);
find("view").addEventListener("pointerleave", hideTooltip);
watch("value", show);
show();
