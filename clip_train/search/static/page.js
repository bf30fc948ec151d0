// The page asks /search and shows what comes back; it loads nothing from anywhere else.
const form = document.getElementById("search");
const text = document.getElementById("text");
const drop = document.getElementById("drop");
const image = document.getElementById("image");
const status = document.getElementById("status");
const results = document.getElementById("results");

function showPicture() {
  drop.querySelector("img")?.remove();
  if (image.files.length === 0) return;
  const preview = document.createElement("img");
  preview.src = URL.createObjectURL(image.files[0]);
  preview.alt = image.files[0].name;
  drop.append(preview);
}

function card(hit) {
  const item = document.createElement("li");
  const picture = document.createElement("img");
  picture.src = `/picture/${hit.number}`;
  picture.alt = hit.caption;
  const about = document.createElement("p");
  const place = document.createElement("small");
  place.textContent = [hit.score.toFixed(4), hit.key, ...hit.fields].join(" · ");
  about.append(hit.caption, document.createElement("br"), place);
  item.append(picture, about);
  return item;
}

async function ask() {
  // The server hangs up on a file that is too large, often before its answer can be read.
  if (image.files[0]?.size > Number(form.dataset.largest)) return { error: form.dataset.tooLarge };
  try {
    return await (await fetch("/search", { method: "POST", body: new FormData(form) })).json();
  } catch (error) {
    return { error: "no answer: is clip-search serve still running?" };
  }
}

async function search() {
  status.className = "";
  status.textContent = "…";
  const answer = await ask();
  status.className = answer.error ? "error" : "";
  status.textContent = answer.error ?? `${answer.hits.length} found in ${answer.milliseconds.toFixed(0)} ms`;
  results.replaceChildren(...(answer.hits ?? []).map(card));
}

form.addEventListener("submit", (event) => { event.preventDefault(); search(); });
text.addEventListener("input", () => { image.value = ""; showPicture(); });
image.addEventListener("change", () => { text.value = ""; showPicture(); search(); });
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", kind === "dragover");
  });
}
document.addEventListener("drop", (event) => {
  if (event.dataTransfer.files.length === 0) return;
  image.files = event.dataTransfer.files;
  image.dispatchEvent(new Event("change"));
});
