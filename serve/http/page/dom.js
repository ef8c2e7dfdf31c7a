/** The element with this id. */
export const at = (id) => document.getElementById(id);

/** A new element. Strings among its children become text, never markup. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Has a screen reader say something, politely. */
export function say(words) {
  at("status").textContent = words;
}

/** Calls a function once its calls have paused for a while; `cancel` forgets a call that waits. */
export function debounce(pause_ms, call) {
  let timer;
  const later = () => {
    clearTimeout(timer);
    timer = setTimeout(call, pause_ms);
  };
  later.cancel = () => clearTimeout(timer);
  return later;
}
