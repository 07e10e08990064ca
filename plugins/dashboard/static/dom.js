// Build and keep elements. Text goes in as text nodes: nothing here, or anywhere on the page, parses
// markup, so a member may be called <img onerror=…>.

export const $ = (selector, root = document) => root.querySelector(selector);

/** A new element with these attributes and children (elements or text). */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** Change a node's text only if it differs: a write costs a layout, and a live region speaks. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Buttons of which one is pressed. `options` is {value: label}; returns their nodes by value. */
export function choice(parent, options, chosen, onChoose) {
  const buttons = new Map();
  for (const [value, label] of Object.entries(options)) {
    const button = el("button", { type: "button", "aria-pressed": value === chosen }, label);
    button.addEventListener("click", () => {
      for (const each of buttons.values()) each.setAttribute("aria-pressed", each === button);
      onChoose(value);
    });
    buttons.set(value, button);
  }
  parent.append(...buttons.values());
  return buttons;
}

/** A list whose nodes live as long as their items: each is made once, updated and moved. */
export class KeyedList {
  /** `make()` returns a node; `update(node, item)` writes an item into it. */
  constructor(parent, key, make, update) {
    Object.assign(this, { parent, key, make, update });
    this.nodes = new Map();
  }

  show(items) {
    const keys = new Set(items.map(this.key));
    for (const [key, node] of this.nodes) if (!keys.has(key)) this.#remove(key, node);
    let next = this.parent.firstElementChild;
    for (const item of items) {
      const node = this.#nodeOf(this.key(item));
      this.update(node, item);
      if (node === next) next = next.nextElementSibling;
      else this.parent.insertBefore(node, next);
    }
  }

  #nodeOf(key) {
    if (!this.nodes.has(key)) this.nodes.set(key, this.make());
    return this.nodes.get(key);
  }

  #remove(key, node) {
    this.nodes.delete(key);
    node.remove();
  }
}
