// Sends the file MAIL_FILE as it is, by nodemailer.
import { createRequire } from "node:module";
import fs from "node:fs";

const { env } = process;
const nodemailer = createRequire(env.MAIL_MODULES + "/")("nodemailer");
const transport = nodemailer.createTransport({
  host: env.MAIL_HOST,
  port: Number(env.MAIL_PORT),
  secure: env.MAIL_TLS === "implicit",
  requireTLS: env.MAIL_TLS === "starttls",
  auth: { user: env.MAIL_LOGIN, pass: env.MAIL_PASSWORD },
  tls: { ca: fs.readFileSync(env.MAIL_CA) },
});
await transport.sendMail({
  envelope: { from: env.MAIL_FROM, to: [env.MAIL_TO] },
  raw: fs.readFileSync(env.MAIL_FILE),
});
transport.close();
