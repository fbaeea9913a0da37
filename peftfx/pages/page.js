(() => {
const holder = document.getElementById("data");
if (!holder) return;
const sites = JSON.parse(holder.textContent), boxes = [...document.querySelectorAll("svg .s")];
const field = document.querySelector("input"), count = document.querySelector("output");
const panel = document.querySelector("aside"), roles = new Set(sites.flatMap(s => [s.role, ...s.parts]));
for (const s of sites) s.paths = s.n.length ? s.n.map(n => s.path.replace("*", n)) : [s.path];
const inRole = (own, role) => own === role || own.startsWith(role + ".");
const ends = (path, name) => path === name || path.endsWith("." + name);
// A target as in peftfx.target, of roles, paths, regular expressions, | & ~ and parentheses; null where it is none.
function target(text) {
const words = text.match(/\/(?:[^/\\]|\\.)+\/|[\w.-]+|[|&~()]|\S/g) || [];
let at = 0;
const atom = word => {
if (word === "all-linear") return s => s.kind === "linear" && s.role !== "head";
if (/^\/.+\/$/.test(word)) { const re = new RegExp("^(?:" + word.slice(1, -1) + ")$"); return (s, p) => re.test(p); }
if ([...roles].some(r => inRole(r, word))) return s => [s.role, ...s.parts].some(r => inRole(r, word));
return (s, p) => ends(p, word);
};
const factor = () => {
const word = words[at++];
if (word === "~") { const f = factor(); return (s, p) => !f(s, p); }
if (word === "(") { const f = union(); if (words[at++] !== ")") throw 0; return f; }
if (!word || /^[|&)]$/.test(word) || !/[\w/]/.test(word)) throw 0;
return atom(word);
};
const joined = (sign, next, both) => () => {
let f = next();
while (words[at] === sign) { at++; const g = f, h = next(); f = both(g, h); }
return f;
};
const all = joined("&", factor, (g, h) => (s, p) => g(s, p) && h(s, p)), union = joined("|", all, (g, h) => (s, p) => g(s, p) || h(s, p));
try { const f = union(); return at === words.length ? f : null; } catch { return null; }
}
function search() {
const text = field.value.trim(), low = text.toLowerCase();
const plain = (s, p) => [p, s.role, s.kind, ...s.parts, ...s.adapters.map(a => a.what)].some(t => t.toLowerCase().includes(low));
const picked = text && target(text), some = picked && sites.some(s => s.paths.some(p => picked(s, p)));
let places = 0;
for (const box of boxes) {
const s = sites[box.dataset.i], on = s.paths.filter(p => !text || (some ? picked(s, p) : plain(s, p))).length;
box.classList.toggle("off", !on);
places += on;
}
count.textContent = text ? places + " of " + sites.reduce((n, s) => n + s.paths.length, 0) + " sites" : "";
}
// A text in an element, which a line ends behind a dot of rather than within a word.
function broken(element, text) {
element.replaceChildren(...text.split(/(?<=\.)/).flatMap((piece, i) => i ? [document.createElement("wbr"), piece] : [piece]));
}
function show(box) {
const s = sites[box.dataset.i];
boxes.forEach(b => b.setAttribute("aria-pressed", b === box));
const rows = [["role", s.role], ["kind", s.kind], ["shape", s.shape], ["calls", s.calls], ["parts", s.rows], ["reads", s.reads],
["where", s.paths.length > 1 ? s.paths.length + " equal places, " + s.paths[0] + " to " + s.paths[s.paths.length - 1] : ""]];
for (const a of s.adapters) rows.push([a.what, a.said]);
const list = document.createElement("dl"), head = document.createElement("h2");
broken(head, s.path);
for (const [name, said] of rows) if (said) {
for (const [tag, value] of [["dt", name], ["dd", said]]) { const e = document.createElement(tag); broken(e, value); list.append(e); }
}
panel.replaceChildren(head, list);
}
boxes.forEach((box, i) => {
box.addEventListener("click", () => { show(box); box.focus(); });
box.addEventListener("keydown", e => {
if (e.key === "Enter" || e.key === " ") { show(box); e.preventDefault(); }
const step = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[e.key];
if (step) { const next = boxes[i + step]; if (next) { next.focus(); show(next); } e.preventDefault(); }
});
});
field.addEventListener("input", search);
document.addEventListener("keydown", e => {
if (e.key === "/" && e.target !== field) { field.focus(); e.preventDefault(); }
if (e.key === "Escape") { field.value = ""; search(); }
});
const asked = new URLSearchParams(location.hash.slice(1));
if (asked.has("q")) { field.value = asked.get("q"); search(); }
if (asked.has("i") && boxes[asked.get("i")]) show(boxes[asked.get("i")]);
})();
