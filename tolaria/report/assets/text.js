"use strict";
// Names and numbers of strangers: they are text everywhere, never HTML.
const CUT = 160;
const get = (id) => document.getElementById(id);

function shorten(text) { // [what is shown, the whole or null]
  const signs = Array.from(String(text));
  return signs.length <= CUT ? [String(text), null] : [signs.slice(0, CUT).join("") + "\u2026", String(text)];
}

function put(element, text) {
  const [shown, whole] = shorten(text);
  element.textContent = shown;
  if (whole !== null) element.title = whole; else element.removeAttribute("title");
  return element;
}

function make(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined && text !== null) put(element, text);
  if (className) element.className = className;
  return element;
}

function sentence(text) { // a paragraph of our own words, in which only names may be long
  const element = document.createElement("span");
  const whole = String(text);
  element.textContent = whole.length <= 900 ? whole : whole.slice(0, 900) + "\u2026";
  if (whole.length > 900) element.title = whole;
  return element;
}

// The chart library reads a few tags in its texts; names must not become any.
function inert(text) {
  return shorten(text)[0].replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

function download(name, text, type) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type}));
  link.download = name;
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
