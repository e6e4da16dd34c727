// What tests/browser asks of a page: `window.probe`. Runs before the frontend does.
window.probe = {
  queued: [], // prompt ids, in order
  ends: [], // how prompts ended: { type, prompt_id, ... }

  /** The frontend is there, with every extension; keeps what is queued and how it ends from now on. */
  ready() {
    const app = window.app
    if (!app?.graph || !app.extensionManager?.setting || !app.canvas?.graph) return false
    if (document.querySelector("#splash-loader, [data-testid=splash]")) return false
    if (!this.listens) {
      this.listens = true
      for (const type of ["execution_success", "execution_error", "execution_interrupted"])
        app.api.addEventListener(type, ({ detail }) => this.ends.push({ type, ...detail }))
      const queue = app.api.queuePrompt
      app.api.queuePrompt = async (...given) => {
        const answer = await queue.apply(app.api, given)
        this.queued.push(answer.prompt_id)
        return answer
      }
    }
    return true
  },

  async load(workflow, name) {
    await window.app.loadGraphData(workflow, true, true, name)
    await this.drawn()
    this.nodes().forEach((node) => this.mark(node.id))
  },

  /** After two frames, in which widgets find their places. */
  drawn() {
    return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(null))))
  },

  nodes() {
    const inside = (graph) => graph.nodes.flatMap((node) => [node, ...(node.subgraph ? inside(node.subgraph) : [])])
    return inside(window.app.rootGraph ?? window.app.graph)
  },

  /** The only node of a type, or the one with this id. */
  node(which) {
    const found = this.nodes().filter((node) => node.type === which || String(node.id) === String(which))
    if (found.length !== 1) throw Error(`${found.length} nodes are ${which}: ${this.nodes().map((node) => node.type)}`)
    return found[0]
  },

  widget(which, name) {
    const node = this.node(which)
    const found = node.widgets.find((widget) => widget.name === name)
    if (!found) throw Error(`${which} has no widget ${name}: ${node.widgets.map((widget) => widget.name)}`)
    return found
  },

  value(which, name) {
    return this.widget(which, name).value
  },

  /** As a user's choice: the widget's own callback runs. */
  set(which, name, value) {
    const widget = this.widget(which, name)
    widget.value = value
    widget.callback?.(value, window.app.canvas, this.node(which))
    window.app.graph.setDirtyCanvas(true, true)
    return this.drawn()
  },

  /** Marks a node's own elements with data-of-node, so that they can be found and waited for. */
  mark(which) {
    const node = this.node(which)
    const elements = node.widgets?.map((widget) => widget.element).filter(Boolean) ?? []
    elements.forEach((element) => (element.dataset.ofNode = String(node.id)))
    return String(node.id)
  },

  /** Puts the middle of some nodes in the middle of the window, below the bars, as large as fits up to `most`. */
  async look(which, most) {
    const { ds, canvas } = window.app.canvas
    const nodes = which.length ? which.map((one) => this.node(one)) : window.app.graph.nodes
    const left = Math.min(...nodes.map((node) => node.pos[0]))
    const top = Math.min(...nodes.map((node) => node.pos[1])) - 30
    const right = Math.max(...nodes.map((node) => node.pos[0] + node.size[0]))
    const bottom = Math.max(...nodes.map((node) => node.pos[1] + node.size[1]))
    const bars = { left: 80, top: 130, right: 30, bottom: 80 } // with room for a group's title
    const room = [canvas.clientWidth - bars.left - bars.right, canvas.clientHeight - bars.top - bars.bottom]
    ds.scale = Math.min(most, room[0] / (right - left), room[1] / (bottom - top))
    ds.offset[0] = (bars.left + room[0] / 2) / ds.scale - (left + right) / 2
    ds.offset[1] = (bars.top + room[1] / 2) / ds.scale - (top + bottom) / 2
    window.app.canvas.setDirty(true, true)
    await this.drawn()
    return this.drawn()
  },

  /** Where a point of a node's area is in the window. */
  point(which, x, y) {
    const node = this.node(which)
    const { ds, canvas } = window.app.canvas
    const box = canvas.getBoundingClientRect()
    return [box.left + (node.pos[0] + x + ds.offset[0]) * ds.scale, box.top + (node.pos[1] + y + ds.offset[1]) * ds.scale]
  },

  /** The part of the window that a node takes, with its title. */
  box(which) {
    const [left, top] = this.point(which, -8, -38)
    const [right, bottom] = this.point(which, this.node(which).size[0] + 8, this.node(which).size[1] + 8)
    return { x: left, y: top, width: right - left, height: bottom - top }
  },

  /** Both ends of a slider that LiteGraph draws, in the window. */
  track(which, name) {
    const { y } = this.widget(which, name)
    return [this.point(which, 15, y + 12), this.point(which, this.node(which).size[0] - 15, y + 12)]
  },

  /** Queues what is open; what the host refused comes back as text. */
  async queue() {
    const app = window.app
    await app.queuePrompt(0, 1)
    return app.lastNodeErrors && Object.keys(app.lastNodeErrors).length ? JSON.stringify(app.lastNodeErrors) : ""
  },

  saved() {
    return JSON.parse(JSON.stringify((window.app.rootGraph ?? window.app.graph).serialize()))
  },

  /** Types of nodes that this host does not know. */
  missing() {
    const known = window.LiteGraph.registered_node_types
    return this.nodes().filter((node) => !node.subgraph && !known[node.type]).map((node) => node.type)
  },
}
