// Sends the file MAIL_FILE as it is, by lettre.
use std::{env, error::Error, fs};

use lettre::{
    address::Envelope,
    transport::smtp::{
        authentication::Credentials,
        client::{Certificate, Tls, TlsParameters},
    },
    SmtpTransport, Transport,
};

fn main() -> Result<(), Box<dyn Error>> {
    let authority = Certificate::from_pem(&fs::read(env::var("MAIL_CA")?)?)?;
    let host = env::var("MAIL_HOST")?;
    let parameters = TlsParameters::builder(host.clone()).add_root_certificate(authority).build()?;
    let tls = if env::var("MAIL_TLS")? == "implicit" { Tls::Wrapper(parameters) } else { Tls::Required(parameters) };
    let transport = SmtpTransport::builder_dangerous(host)
        .port(env::var("MAIL_PORT")?.parse()?)
        .tls(tls)
        .credentials(Credentials::new(env::var("MAIL_LOGIN")?, env::var("MAIL_PASSWORD")?))
        .build();
    let envelope = Envelope::new(Some(env::var("MAIL_FROM")?.parse()?), vec![env::var("MAIL_TO")?.parse()?])?;
    transport.send_raw(&envelope, &fs::read(env::var("MAIL_FILE")?)?)?;
    Ok(())
}
