// @ts-check
/** How a layer map looks, in ComfyUI's light and dark colours. */
import { FORMATS, KERNELS, STEPS } from "./layer_map_colours.js"

/** Black or white, whichever is read better on a colour. @param {string} colour */
function ink(colour) {
  const [r, g, b] = [1, 3, 5].map((at) => (parseInt(colour.slice(at, at + 2), 16) / 255) ** 2.2)
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 ? "#111" : "#fff"
}

/** @param {string} style @param {string} colour */
function fill(style, colour) {
  return `.tessera-map .${style} { --fill: ${colour}; --ink: ${ink(colour)}; }`
}

const FILLS = [
  ...Object.entries(FORMATS).map(([family, [colour]]) => fill(`f-${family}`, colour)),
  ...KERNELS.map((colour, at) => fill(`k-${at}`, colour)),
  ...STEPS.map((colour, at) => fill(`s-${at}`, colour)),
].join("\n")

export const STYLE = `
.tessera-map { width: 100%; box-sizing: border-box; overflow: hidden; color: var(--input-text, #ddd);
  font: 12px/1.35 Inter, Arial, sans-serif; --quiet: var(--descrip-text, #999); --line: var(--border-color, #4e4e4e);
  --accent: var(--p-primary-color, #4a90e2); }
.tessera-map .inner { display: flex; flex-direction: column; gap: 8px; padding: 2px 0; }
.tessera-map .message { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; color: var(--quiet); }
.tessera-map .message.error { color: var(--error-text, #ff4444); border-left: 3px solid currentColor; padding-left: 8px; max-height: 190px; overflow: auto; }
.tessera-map .facts { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 0; }
.tessera-map .facts div { display: flex; flex-direction: column-reverse; min-width: 0; }
.tessera-map .facts button { margin-left: auto; align-self: start; flex: none; }
.tessera-map .facts dt { color: var(--quiet); font-size: 10px; }
.tessera-map .facts dd { margin: 0; font-size: 14px; font-weight: 600; font-variant-numeric: tabular-nums; }
.tessera-map .facts dt b { margin-left: 5px; color: var(--input-text, #ddd); font-variant-numeric: tabular-nums; }
.tessera-map .editable .facts { flex-wrap: nowrap; overflow: hidden; white-space: nowrap; }
.tessera-map .editable .facts div:not(:nth-child(4)) { flex: none; }
.tessera-map .editable .facts :is(dd, dt) { overflow: hidden; text-overflow: ellipsis; }
.tessera-map .bar { display: flex; flex-wrap: wrap; gap: 4px 12px; align-items: center; min-height: 20px; }
.tessera-map .by { display: inline-flex; border: 1px solid var(--line); border-radius: 5px; overflow: hidden; }
.tessera-map .bar { gap: 4px 8px; }
.tessera-map .by label { position: relative; padding: 1px 8px; font-size: 11px; cursor: pointer; color: var(--quiet); }
.tessera-map .by label + label { border-left: 1px solid var(--line); }
.tessera-map .by label:has(:checked) { background: var(--comfy-input-bg, #222); color: var(--input-text, #ddd); font-weight: 600; }
.tessera-map .by label:has(:focus-visible) { outline: 2px solid var(--accent); outline-offset: -2px; }
.tessera-map .by input { position: absolute; inset: 0; opacity: 0; margin: 0; cursor: pointer; }
.tessera-map .legend { display: flex; flex-wrap: wrap; gap: 3px 12px; align-items: center; font-size: 11px; }
.tessera-map .entry { display: inline-flex; gap: 5px; align-items: center; white-space: nowrap; }
.tessera-map .entry b { font-weight: 600; font-variant-numeric: tabular-nums; }
.tessera-map .swatch { display: inline-grid; place-items: center; width: 13px; height: 13px; border-radius: 3px; box-sizing: border-box;
  background: var(--fill, transparent); color: var(--ink, inherit); font: 700 9px/1 Inter, Arial, sans-serif; }
.tessera-map .ramp { width: 110px; height: 9px; border-radius: 3px; background: linear-gradient(to right, ${STEPS.join(", ")}); }
.tessera-map .grid { user-select: none; }
.tessera-map .panel { position: relative; }
.tessera-map .flags { position: relative; margin-left: var(--label); font-size: 10px; color: var(--quiet); }
.tessera-map .flags span { position: absolute; line-height: 12px; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; padding-left: 3px; box-sizing: border-box; }
.tessera-map .flags i { position: absolute; width: 1px; background: var(--line); }
.tessera-map [role="row"] { display: flex; height: var(--high); }
.tessera-map .numbers { height: 11px; font-size: 8px; color: var(--quiet); }
.tessera-map .numbers [role="columnheader"] { display: grid; place-items: center; width: var(--wide); white-space: nowrap; flex: none; line-height: 1;
  font-variant-numeric: tabular-nums; color: transparent; }
.tessera-map .numbers .shown { color: inherit; }
.tessera-map .numbers:hover .shown { color: transparent; }
.tessera-map .numbers [role="columnheader"]:hover { color: var(--input-text, #ddd); }
.tessera-map .painting :is([role="columnheader"], [role="rowheader"], .tile) { cursor: crosshair; }
.tessera-map .painting :is([role="columnheader"], [role="rowheader"]):hover { color: var(--accent); }
.tessera-map .painting .tile.fixed { cursor: not-allowed; }
.tessera-map .editable .tile.fixed { opacity: 0.5; }
.tessera-map .tools { display: flex; flex-wrap: wrap; gap: 4px; align-items: center; }
.tessera-map .tools .push { display: inline-flex; gap: 4px; margin-left: auto; }
.tessera-map .brush { display: inline-flex; gap: 5px; align-items: center; padding: 0 7px 0 3px; }
.tessera-map .brush[aria-pressed="true"], .tessera-map [data-part="mode"][aria-pressed="true"] { border-color: var(--accent); box-shadow: 0 0 0 1px var(--accent); font-weight: 600; }
.tessera-map .tools .text { flex-basis: 100%; height: 74px; padding: 4px 6px; resize: none; font: 11px/1.4 monospace; cursor: text; white-space: pre; }
.tessera-map .notes.error { color: var(--error-text, #ff4444); }
.tessera-map .notes { margin: 0; color: var(--quiet); font-size: 11px; white-space: pre-wrap; overflow-wrap: anywhere; }
.tessera-map [hidden] { display: none !important; }
.tessera-map .quiet { color: var(--quiet); font-size: 11px; }
.tessera-map .rowlabel { width: var(--label); flex: none; box-sizing: border-box; padding-right: 6px; overflow: hidden; white-space: nowrap;
  text-overflow: ellipsis; text-align: right; font-size: 10px; line-height: var(--high); color: var(--quiet); }
.tessera-map .dense .rowlabel { font-size: 8px; }
.tessera-map .space { width: var(--gap); flex: none; }
.tessera-map .tile { flex: none; width: var(--wide); height: var(--high); box-sizing: border-box; padding: 0; border: 0 solid transparent; border-width: 0 1px 1px 0;
  background: var(--fill, transparent) padding-box; color: var(--ink, inherit); border-radius: 3px; cursor: default; outline: none; position: relative;
  text-align: center; overflow: hidden; font: 600 8px Inter, Arial, sans-serif; line-height: calc(var(--high) - 1px); user-select: none; }
.tessera-map .small .tile { font-size: 0; border-radius: 2px; }
.tessera-map .hole { flex: none; width: var(--wide); }
.tessera-map .none { --fill: transparent; --ink: var(--quiet); box-shadow: inset 0 0 0 1px var(--line); }
.tessera-map .swatch.branch { --fill: #8A8A8A; background-image: linear-gradient(to top, #111 4px, transparent 4px); }
.tessera-map .tile.branch { background-image: linear-gradient(to top, rgba(0, 0, 0, 0.55) 2px, transparent 2px); }
.tessera-map .tile.waiting { opacity: 0.28; }
.tessera-map .tile.now { box-shadow: inset 0 0 0 2px var(--input-text, #ddd); opacity: 1; }
.tessera-map :is(.tile, .swatch).edited::after { content: ""; position: absolute; top: 0; right: 0; width: 6px; height: 6px;
  background: var(--input-text, #ddd); clip-path: polygon(0 0, 100% 0, 100% 100%); }
.tessera-map .swatch.edited { --fill: #8A8A8A; overflow: hidden; }
.tessera-map .swatch { position: relative; }
.tessera-map .tile.gathered { filter: brightness(1.35); outline: 1px dashed var(--input-text, #ddd); outline-offset: -1px; }
.tessera-map .tile:hover, .tessera-map .tile:focus { outline: 2px solid var(--accent); outline-offset: -1px; z-index: 1; overflow: visible; }
.tessera-map .details { border-top: 1px solid var(--line); padding-top: 5px; height: 81px; overflow: hidden; font-size: 11px; color: var(--quiet); }
.tessera-map .details div { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.tessera-map .details .shape { float: right; }
.tessera-map .details .name { color: var(--input-text, #ddd); font-weight: 600; }
.tessera-map .details .last { white-space: normal; display: -webkit-box; -webkit-line-clamp: 2; -webkit-box-orient: vertical; }
.tessera-map button, .tessera-map select, .tessera-map textarea { box-sizing: border-box; min-width: 0; margin: 0; border: 1px solid var(--line); border-radius: 5px;
  background: var(--comfy-input-bg, #222); color: var(--input-text, #ddd); font: 11px Inter, Arial, sans-serif; height: 20px; padding: 0 7px; cursor: pointer; }
.tessera-map button:disabled { opacity: 0.4; cursor: default; }
.tessera-map :is(button, select, textarea):focus-visible { outline: 2px solid var(--accent); }
${FILLS}
`
