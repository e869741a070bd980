//! Where etcd is and how to get in: what the URL and the options say.
//!
//! `etcd://[USER[:PASSWORD]@]HOST[:PORT][,HOST[:PORT]…][/PREFIX]`, `etcds://` with TLS. Options: `user`, `password`, and for
//! TLS `ca`, `cert`, `key` (paths of PEM files) and `server_name`.

use std::fmt;
use std::sync::Arc;

use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto};

use crate::config::{Access, Secret, decode};
use crate::error::{Error, Result};

/// Where the lines are when the URL names no prefix.
const PREFIX: &str = "lease";

/// All that a URL and its options say.
#[derive(Debug)]
pub(super) struct Address {
    /// At least one.
    pub(super) endpoints: Vec<Endpoint>,
    pub(super) prefix: String,
    pub(super) credentials: Option<Credentials>,
    pub(super) tls: Option<Tls>,
}

/// One server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Endpoint {
    /// A name or an address, IPv6 without brackets.
    pub(super) host: String,
    pub(super) port: u16,
}

#[derive(Clone, Debug)]
pub(super) struct Credentials {
    pub(super) user: String,
    pub(super) password: Secret,
}

#[derive(Clone)]
pub(super) struct Tls {
    pub(super) connector: TlsConnector,
    server_name: Option<ServerName<'static>>,
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port } = self;
        if host.contains(':') { write!(f, "[{host}]:{port}") } else { write!(f, "{host}:{port}") }
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("server_name", &self.server_name).finish_non_exhaustive()
    }
}

impl Address {
    /// Takes apart what follows the scheme, not decoded yet.
    pub(super) fn parse(secure: bool, rest: &str, access: &Access) -> Result<Self> {
        let scheme = if secure { "etcds" } else { "etcd" };
        let Some(rest) = rest.strip_prefix("//") else {
            return Err(Error::invalid(format!("write {scheme}://HOST:PORT/PREFIX, with several hosts as HOST,HOST")));
        };
        let (authority, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let (userinfo, hosts) = match authority.rsplit_once('@') {
            Some((userinfo, hosts)) => (Some(userinfo), hosts),
            None => (None, authority),
        };
        let endpoints = hosts.split(',').enumerate();
        let endpoints =
            endpoints.map(|(at, host)| Endpoint::parse(scheme, at + 1, host)).collect::<Result<Vec<_>>>()?;
        for (at, endpoint) in endpoints.iter().enumerate() {
            if endpoints[..at].contains(endpoint) {
                return Err(Error::invalid(format!("the URL names {endpoint} twice")));
            }
        }
        if prefix.contains('@') {
            return Err(Error::invalid(
                "there is an '@' after the first '/': in user and password write %2F for '/', in a prefix %40 for '@'",
            ));
        }
        let prefix = decode(prefix)?;
        let prefix = prefix.trim_end_matches('/');
        let prefix = if prefix.is_empty() { PREFIX } else { prefix };
        if prefix.contains('\0') {
            return Err(Error::invalid("the URL's prefix has a NUL"));
        }
        Ok(Self {
            endpoints,
            prefix: prefix.into(),
            credentials: credentials(userinfo, access)?,
            tls: tls(secure, access)?,
        })
    }
}

impl Endpoint {
    fn parse(scheme: &str, number: usize, text: &str) -> Result<Self> {
        // Without the text: of a URL that is written wrongly it may be a part of the password.
        let wrong = |why: &str| Error::invalid(format!("host {number} of the URL: {why}"));
        let text = decode(text)?;
        let (host, port) = match text.strip_prefix('[') {
            Some(address) => {
                let (host, port) = address.split_once(']').ok_or_else(|| wrong("'[' without ']'"))?;
                host.parse::<std::net::Ipv6Addr>().map_err(|_| wrong("between brackets is an IPv6 address"))?;
                match port.strip_prefix(':') {
                    None if !port.is_empty() => return Err(wrong("after ']' follows ':' and the port")),
                    port => (host, port),
                }
            }
            None => match text.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (&*text, None),
            },
        };
        if host.is_empty() {
            return Err(wrong(&format!("write {scheme}://HOST:PORT/PREFIX")));
        }
        if host.contains(|letter: char| letter.is_whitespace() || letter.is_control() || "/@[]".contains(letter)) {
            return Err(wrong("no host has such letters in its name; in user and password write %2F for '/'"));
        }
        let port = match port {
            None => 2379,
            Some(port) => Some(port)
                .filter(|port| port.bytes().all(|digit| digit.is_ascii_digit()))
                .and_then(|port| port.parse().ok())
                .filter(|port| *port > 0)
                .ok_or_else(|| wrong("a port is 1 to 65535"))?,
        };
        Ok(Self { host: host.into(), port })
    }
}

impl Tls {
    /// The name that the certificate of that server must have.
    pub(super) fn server_name(&self, endpoint: &Endpoint) -> Result<ServerName<'static>> {
        let name = self.server_name.clone().map_or_else(|| server_name(&endpoint.host), Ok);
        name.map_err(|error| error.during("connect", None))
    }
}

fn server_name(text: &str) -> Result<ServerName<'static>> {
    ServerName::try_from(text.to_owned()).map_err(|error| {
        Error::invalid(format!("{text:?} is no name that a certificate could have")).with_source(error)
    })
}

fn credentials(userinfo: Option<&str>, access: &Access) -> Result<Option<Credentials>> {
    let (mut user, mut password) = (access.user.clone(), access.password.clone());
    if let Some(userinfo) = userinfo {
        if user.is_some() || password.is_some() {
            return Err(Error::invalid("there is a user in the URL and one in the options: give one of them"));
        }
        let (name, secret) = userinfo.split_once(':').map_or((userinfo, None), |(name, secret)| (name, Some(secret)));
        user = Some(decode(name)?);
        password = secret.map(decode).transpose()?.map(Secret::new);
    }
    match (user, password) {
        (None, None) => Ok(None),
        (Some(user), Some(password)) if !user.is_empty() => Ok(Some(Credentials { user, password })),
        (Some(_), Some(_)) => Err(Error::invalid("the user is empty")),
        (Some(_), None) => Err(Error::invalid("there is a user without a password: give the option \"password\"")),
        (None, Some(_)) => Err(Error::invalid("there is a password without a user: give the option \"user\"")),
    }
}

/// Reads the files, so that what is wrong with them is told when the manager is opened.
fn tls(secure: bool, access: &Access) -> Result<Option<Tls>> {
    let Access { ca, cert, key, server_name: name, .. } = access;
    if !secure {
        let given = [("ca", ca), ("cert", cert), ("key", key), ("server_name", name)];
        return match given.iter().find(|(_, value)| value.is_some()) {
            Some((option, _)) => Err(Error::invalid(format!("option {option:?} is about TLS: write etcds://"))),
            None => Ok(None),
        };
    }
    for (option, value) in [("ca", ca), ("cert", cert), ("key", key)] {
        if value.as_ref().is_some_and(|value| value.contains("-----BEGIN")) {
            return Err(Error::invalid(format!("option {option:?} is the path of a file, and not what is in it")));
        }
    }
    let mut roots = RootCertStore::empty();
    if let Some(path) = ca {
        for certificate in certificates("ca", path)? {
            let added = roots.add(certificate);
            added.map_err(|error| {
                Error::invalid(format!("option \"ca\": a certificate in {path}")).with_source(error)
            })?;
        }
    } else {
        let native = rustls_native_certs::load_native_certs();
        roots.add_parsable_certificates(native.certs);
        if roots.is_empty() {
            return Err(Error::invalid("this machine has no root certificates: give the option \"ca\""));
        }
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| Error::invalid("TLS").with_source(error))?
        .with_root_certificates(roots);
    let mut config = match (cert, key) {
        (None, None) => builder.with_no_client_auth(),
        (Some(cert), Some(key)) => {
            // The error of a key that cannot be read names the file, and nothing of what is in it.
            let secret = PrivateKeyDer::from_pem_file(key).map_err(|_| {
                Error::invalid(format!("option \"key\": {key} is no private key in PEM that can be read"))
            })?;
            builder.with_client_auth_cert(certificates("cert", cert)?, secret).map_err(|_| {
                Error::invalid(format!("option \"key\": {key} is not the key of the certificate in {cert}"))
            })?
        }
        (Some(_), None) => return Err(Error::invalid("option \"cert\" without \"key\": give both")),
        (None, Some(_)) => return Err(Error::invalid("option \"key\" without \"cert\": give both")),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let server_name = name.as_deref().map(server_name).transpose()?;
    Ok(Some(Tls { connector: TlsConnector::from(Arc::new(config)), server_name }))
}

fn certificates(option: &str, path: &str) -> Result<Vec<CertificateDer<'static>>> {
    let wrong = || Error::invalid(format!("option {option:?}: {path} has no certificate in PEM that can be read"));
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    read.map_err(|error| wrong().with_source(error))
        .and_then(|read| if read.is_empty() { Err(wrong()) } else { Ok(read) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn parse(rest: &str) -> Result<Address> {
        Address::parse(false, rest, &Access::default())
    }

    #[test]
    fn hosts_ports_and_prefixes_are_taken_as_they_are_meant() {
        for (rest, endpoints, prefix) in [
            ("//h", "h:2379", "lease"),
            ("//h:1/", "h:1", "lease"),
            ("//h1,h2:2/a/b/", "h1:2379 h2:2", "a/b"),
            ("//[::1]:3,10.0.0.1/%2Fx", "[::1]:3 10.0.0.1:2379", "/x"),
            ("//[::1]", "[::1]:2379", "lease"),
        ] {
            let address = parse(rest).unwrap();
            let told: Vec<String> = address.endpoints.iter().map(ToString::to_string).collect();
            assert_eq!((&*told.join(" "), &*address.prefix), (endpoints, prefix), "{rest}");
        }
        for wrong in [
            "",
            "h",
            "/h",
            "//",
            "//h,",
            "//h:0",
            "//h:x",
            "//h:70000",
            "//[::1",
            "//[::1]2379",
            "//h:+80",
            "//user:123/45@h",
            "//[x]:1",
            "//h,h",
            "//a b",
            "//:1",
        ] {
            assert_eq!(parse(wrong).unwrap_err().kind(), ErrorKind::Invalid, "{wrong:?}");
        }
    }

    #[test]
    fn a_password_may_have_anything_in_it_and_is_shown_nowhere() {
        let address = parse("//us%40er:p%3Aa%2Fs%40s@h/x").unwrap();
        let credentials = address.credentials.clone().unwrap();
        assert_eq!((&*credentials.user, credentials.password.reveal()), ("us@er", "p:a/s@s"));
        assert!(!format!("{address:?}").contains("p:a"));
        for wrong in ["//user@h", "//:pass@h"] {
            assert_eq!(parse(wrong).unwrap_err().kind(), ErrorKind::Invalid, "{wrong}");
        }
    }
}
