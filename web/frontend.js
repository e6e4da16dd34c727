// @ts-check
/** The one module that knows ComfyUI's frontend by address; everything else imports `app` and `api` from here. */
// @ts-ignore served by ComfyUI
export { app } from "../../scripts/app.js"
// @ts-ignore served by ComfyUI
export { api } from "../../scripts/api.js"
