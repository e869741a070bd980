//! Settings: from a URL, from methods, from the environment; checked once, never clamped, never ignored.

use std::ffi::OsString;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use crate::error::{Error, Result};
use crate::manager::Manager;
use crate::runtime::{Environment, system};
use crate::store::{Limits, Store};
use crate::stores;

/// The longest ttl.
pub(crate) const MAX_TTL: Duration = Duration::from_secs(24 * 60 * 60);

/// The longest owner text, in bytes.
pub(crate) const MAX_OWNER: usize = 1024;

/// The option keys: the same words in URLs, `LEASE_*` variables and every language.
const KEYS: &[&str] =
    &["ttl", "timeout", "owner", "request_timeout", "user", "password", "ca", "cert", "key", "server_name"];

#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) ttl: Duration,
    pub(crate) timeout: Option<Duration>,
    pub(crate) owner: Arc<str>,
    pub(crate) request_timeout: Duration,
    pub(crate) access: Access,
}

/// How a store that asks for it lets one in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Access {
    pub(crate) user: Option<String>,
    pub(crate) password: Option<Secret>,
    /// Paths of files in PEM: who vouches for the server, who this client is, and its private key.
    pub(crate) ca: Option<String>,
    pub(crate) cert: Option<String>,
    pub(crate) key: Option<String>,
    /// The name in the server's certificate, if it is not the host's.
    pub(crate) server_name: Option<String>,
}

/// What no log, error or `Debug` shows.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Secret(Arc<str>);

impl Secret {
    pub(crate) fn new(secret: impl Into<Arc<str>>) -> Self {
        Self(secret.into())
    }

    #[cfg(feature = "etcd")]
    pub(crate) fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            ttl: Duration::from_secs(30),
            timeout: None,
            owner: default_owner(),
            request_timeout: Duration::from_secs(3),
            access: Access::default(),
        }
    }
}

fn default_owner() -> Arc<str> {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    format!("{host}:{}", std::process::id()).into()
}

impl Config {
    /// Sets one option from text.
    pub(crate) fn set(&mut self, key: &str, value: &str) -> Result<()> {
        match key {
            "ttl" => self.ttl = duration(key, value)?,
            "timeout" if value == "none" => self.timeout = None,
            "timeout" => self.timeout = Some(duration(key, value)?),
            "request_timeout" => self.request_timeout = duration(key, value)?,
            "owner" => {
                Self::check_owner(value)?;
                self.owner = value.into();
            }
            "user" => self.access.user = Some(value.into()),
            "password" => self.access.password = Some(Secret::new(value)),
            "ca" => self.access.ca = Some(value.into()),
            "cert" => self.access.cert = Some(value.into()),
            "key" => self.access.key = Some(value.into()),
            "server_name" => self.access.server_name = Some(value.into()),
            _ => return Err(unknown("option", key, KEYS)),
        }
        Ok(())
    }

    /// What a URL alone says.
    #[cfg(feature = "etcd")]
    pub(crate) fn of_url(url: &str) -> Result<(Self, Url)> {
        let (mut config, url) = (Self::default(), Url::parse(url)?);
        for (key, value) in &url.options {
            config.set(key, value)?;
        }
        Ok((config, url))
    }

    pub(crate) fn check_owner(owner: &str) -> Result<()> {
        if owner.len() > MAX_OWNER || owner.contains('\0') {
            return Err(Error::invalid(format!("owner must have at most {MAX_OWNER} bytes and no NUL")));
        }
        Ok(())
    }

    pub(crate) fn check_ttl(ttl: Duration, limits: Limits) -> Result<()> {
        let min = limits.min_ttl;
        if ttl < min {
            return Err(Error::invalid(format!("ttl {ttl:?} is too short: this store needs at least {min:?}")));
        }
        if ttl > MAX_TTL {
            return Err(Error::invalid(format!("ttl {ttl:?} is too long: at most 24h")));
        }
        Ok(())
    }
}

/// `15s`, `500ms`, `1m 30s`; a bare number has no unit and is refused, but 0 needs none.
fn duration(key: &str, value: &str) -> Result<Duration> {
    let hint = || format!("{key}={value:?} is no duration: write a number and a unit, such as 15s or 500ms");
    humantime::parse_duration(value).map_err(|error| Error::invalid(hint()).with_source(error))
}

pub(crate) fn unknown(what: &str, word: &str, known: &[&str]) -> Error {
    // Small letters and capitals are alike: one is written for the other.
    let likeness = |known: &str| strsim::jaro(&word.to_lowercase(), &known.to_lowercase());
    let near = known.iter().map(|known| (likeness(known), known)).max_by(|a, b| a.0.total_cmp(&b.0));
    // A guess that is far off is worse than none.
    let near = near.filter(|(similarity, _)| *similarity > 0.7);
    let near = near.map_or_else(|| ".".into(), |(_, known)| format!("; did you mean {known:?}?"));
    Error::invalid(format!("unknown {what} {word:?}{near} Known: {}", known.join(", ")))
}

/// A store's URL taken apart: `scheme:rest?key=value&…`, all parts percent-decoded but `raw`.
#[derive(PartialEq, Eq)]
pub(crate) struct Url {
    pub(crate) scheme: String,
    pub(crate) rest: String,
    /// The rest before it was decoded, for stores to which an escaped letter is not the letter.
    pub(crate) raw: String,
    options: Vec<(String, String)>,
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // All else may be, or hold, a password.
        f.debug_struct("Url").field("scheme", &self.scheme).finish_non_exhaustive()
    }
}

impl Url {
    fn parse(url: &str) -> Result<Self> {
        let Some((scheme, rest)) = url.split_once(':') else {
            let example = "such as sqlite:jobs.db or etcd://h1,h2,h3";
            return Err(Error::invalid(format!("the URL has no scheme: write SCHEME:PLACE, {example}")));
        };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        if let Some(wrong) = rest.chars().find(|letter| "#;&".contains(*letter)) {
            let escaped = format!("%{:02X}", u32::from(wrong));
            return Err(Error::invalid(format!(
                "{wrong:?} in the URL: options follow a '?'; in a name write {escaped}"
            )));
        }
        let pairs = query.split('&').filter(|pair| !pair.is_empty()).enumerate().map(|(at, pair)| {
            // Without the text: of a URL that is written wrongly it may be a part of the password.
            let wrong =
                || format!("option {} of the URL has no value: write KEY=VALUE, %3F for '?', %26 for '&'", at + 1);
            let (key, value) = pair.split_once('=').ok_or_else(|| Error::invalid(wrong()))?;
            let (key, value) = (decode(key)?, decode(value)?);
            if !KEYS.contains(&&*key) && (query.contains('@') || query.contains("password")) {
                return Err(Error::invalid(format!(
                    "option {} of the URL is unknown: in a user or password write %3F for '?', %26 for '&'",
                    at + 1
                )));
            }
            Ok((key, value))
        });
        let options: Vec<(String, String)> = pairs.collect::<Result<_>>()?;
        for (at, (key, _)) in options.iter().enumerate() {
            if options[..at].iter().any(|(other, _)| other == key) {
                return Err(Error::invalid(format!("the URL gives option {key:?} twice")));
            }
        }
        Ok(Self { scheme: scheme.to_ascii_lowercase(), rest: decode(rest)?, raw: rest.into(), options })
    }
}

pub(crate) fn decode(part: &str) -> Result<String> {
    let escaped = |rest: &str| rest.as_bytes().get(..2).is_some_and(|hex| hex.iter().all(u8::is_ascii_hexdigit));
    if !part.split('%').skip(1).all(escaped) {
        return Err(Error::invalid("'%' in the URL without two hexadecimal digits after it: for a '%' write %25"));
    }
    let decoded = percent_decode_str(part).decode_utf8();
    decoded.map(Into::into).map_err(|error| Error::invalid("the URL is not UTF-8 when decoded").with_source(error))
}

/// How long to wait; `None`: for ever.
type Timeout = Option<Duration>;

/// Settings by method. They beat the URL's, which beat the `LEASE_*` variables.
///
/// ```
/// # futures_lite::future::block_on(async {
/// use std::time::Duration;
/// let manager = lease_core::Manager::builder().url("memory:").ttl(Duration::from_secs(10)).open().await?;
/// # manager.close().await }).map_err(|e: lease_core::Error| e).unwrap();
/// ```
#[derive(Default)]
pub struct Builder {
    url: Option<String>,
    ttl: Option<Duration>,
    timeout: Option<Timeout>,
    owner: Option<String>,
    request_timeout: Option<Duration>,
    options: Vec<(String, String)>,
    store: Option<Arc<dyn Store>>,
    env: Option<Arc<dyn Environment>>,
}

impl Builder {
    /// The store's URL; `LEASE_URL` when none is given.
    #[must_use]
    pub fn url(mut self, url: impl Into<String>) -> Self {
        self.url = Some(url.into());
        self
    }

    /// A store of your own, in place of a URL.
    #[must_use]
    pub fn store(mut self, store: Arc<dyn Store>) -> Self {
        self.store = Some(store);
        self
    }

    /// The lifetime without renewal of leases that name no other. Default 30 s.
    #[must_use]
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = Some(ttl);
        self
    }

    /// How long `acquire` waits where it names nothing else. Default: for ever.
    #[must_use]
    pub fn timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.timeout = Some(timeout.into());
        self
    }

    /// The text shown to others. Default `host:pid`.
    #[must_use]
    pub fn owner(mut self, owner: impl Into<String>) -> Self {
        self.owner = Some(owner.into());
        self
    }

    /// The bound of one store request. Default 3 s.
    #[must_use]
    pub fn request_timeout(mut self, request_timeout: Duration) -> Self {
        self.request_timeout = Some(request_timeout);
        self
    }

    /// Any option by its key and text, as in a URL: `option("ttl", "15s")`. Checked by [`open`](Self::open).
    #[must_use]
    pub fn option(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.options.push((key.into(), value.into()));
        self
    }

    /// Whether [`option`](Self::option) would take this, without opening anything.
    ///
    /// # Errors
    /// `Invalid` for an unknown key, naming the nearest known one, or a wrong value.
    pub fn check_option(key: &str, value: &str) -> Result<()> {
        Config::default().set(key, value)
    }

    /// The URL with the path of a file made absolute: for bindings, which may open it again in a child of a fork, or elsewhere.
    ///
    /// # Errors
    /// `Invalid` for a wrong URL, and when the working directory has no name that a URL could have.
    pub fn absolute(url: &str) -> Result<String> {
        const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'.').remove(b'-').remove(b'_').remove(b'~');
        let Url { scheme, rest, .. } = Url::parse(url)?;
        if scheme != "sqlite" || rest.starts_with('/') {
            return Ok(url.into());
        }
        let directory = std::env::current_dir()
            .map_err(|error| Error::invalid("the working directory cannot be found").with_source(error))?;
        let directory =
            directory.to_str().ok_or_else(|| Error::invalid("the working directory's name is not UTF-8"))?;
        let relative = url.split_once(':').map_or("", |(_, relative)| relative);
        Ok(format!("sqlite:{}/{relative}", utf8_percent_encode(directory.trim_end_matches('/'), PLAIN)))
    }

    /// The clock, randomness and threads, in place of the machine's.
    #[cfg(feature = "test-util")]
    #[must_use]
    pub fn environment(mut self, env: Arc<dyn Environment>) -> Self {
        self.env = Some(env);
        self
    }

    /// Opens the manager.
    ///
    /// # Errors
    /// As [`Manager::open`].
    ///
    /// # Cancel safety
    /// Safe: nothing is left behind.
    // Async though nothing waits yet: a store that has to look before it opens must not change every caller.
    #[expect(clippy::unused_async, reason = "stores may come to wait here")]
    pub async fn open(self) -> Result<Manager> {
        self.build().map_err(|error| error.during("open", None))
    }

    /// [`open`](Self::open) for threads.
    ///
    /// # Errors
    /// The same.
    pub fn open_blocking(self) -> Result<crate::blocking::Manager> {
        self.build().map(Into::into).map_err(|error| error.during("open", None))
    }

    fn build(self) -> Result<Manager> {
        let variables = std::env::vars_os().filter(|(key, _)| key.as_encoded_bytes().starts_with(b"LEASE_"));
        let utf8 = |(key, value): (OsString, OsString)| {
            // The value may be a secret.
            let wrong = format!("variable {} is not UTF-8", key.display());
            match (key.into_string(), value.into_string()) {
                (Ok(key), Ok(value)) => Ok((key, value)),
                _ => Err(Error::invalid(wrong)),
            }
        };
        let variables: Vec<_> = variables.map(utf8).collect::<Result<_>>()?;
        let (config, url) = self.configure(variables.into_iter())?;
        let env = self.env.map_or_else(system, Ok)?;
        let store = match (self.store, url) {
            (Some(_), Some(_)) => return Err(Error::invalid("there is a store and a URL: give one of them")),
            (Some(store), None) => store,
            (None, Some(url)) => stores::open(&url, &config, &env)?,
            (None, None) => {
                return Err(Error::invalid("no URL: give one, such as sqlite:jobs.db, or set LEASE_URL"));
            }
        };
        Manager::start(config, store, env)
    }

    /// The settings in force: methods before URL before variables.
    fn configure(&self, variables: impl Iterator<Item = (String, String)>) -> Result<(Config, Option<Url>)> {
        let mut config = Config::default();
        let mut url = self.url.clone();
        for (variable, value) in variables {
            match variable.strip_prefix("LEASE_") {
                Some("URL") if url.is_none() && self.store.is_none() => url = Some(value),
                Some("URL") | None => {}
                Some(key) if KEYS.contains(&key.to_ascii_lowercase().as_str()) && key == key.to_ascii_uppercase() => {
                    let set = config.set(&key.to_ascii_lowercase(), &value);
                    set.map_err(|error| Error::invalid(format!("variable {variable}: {}", error.message())))?;
                }
                Some(_) => {
                    let known = KEYS.iter().map(|key| format!("LEASE_{}", key.to_ascii_uppercase()));
                    let known: Vec<String> = std::iter::once("LEASE_URL".into()).chain(known).collect();
                    let error = unknown("variable", &variable, &known.iter().map(String::as_str).collect::<Vec<_>>());
                    return Err(Error::invalid(format!("{}: the prefix LEASE_ is this library's", error.message())));
                }
            }
        }
        let url = url.map(|url| Url::parse(&url)).transpose()?;
        for (key, value) in url.iter().flat_map(|url| &url.options).chain(&self.options) {
            config.set(key, value)?;
        }
        config.ttl = self.ttl.unwrap_or(config.ttl);
        config.timeout = self.timeout.unwrap_or(config.timeout);
        if let Some(owner) = &self.owner {
            config.set("owner", owner)?;
        }
        config.request_timeout = self.request_timeout.unwrap_or(config.request_timeout);
        if config.request_timeout.is_zero() {
            return Err(Error::invalid("request_timeout is 0: give the time one store request may take, such as 3s"));
        }
        Ok((config, url))
    }
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The URL of some stores carries a password, and so may an option.
        f.debug_struct("Builder").field("ttl", &self.ttl).field("timeout", &self.timeout).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn configure(builder: &Builder, variables: &[(&str, &str)]) -> Result<(Config, Option<Url>)> {
        builder.configure(variables.iter().map(|(key, value)| ((*key).into(), (*value).into())))
    }

    #[test]
    fn methods_beat_the_url_which_beats_variables() {
        let variables = [("LEASE_TTL", "1s"), ("LEASE_TIMEOUT", "2s"), ("LEASE_OWNER", "var"), ("HOME", "/")];
        let builder = Builder::default().url("memory:?ttl=3s&timeout=4s").ttl(Duration::from_secs(5));
        let (config, _) = configure(&builder, &variables).unwrap();
        assert_eq!((config.ttl, config.timeout), (Duration::from_secs(5), Some(Duration::from_secs(4))));
        assert_eq!(&*config.owner, "var");
    }

    #[test]
    fn a_path_is_made_absolute_and_nothing_else() {
        let here = std::env::current_dir().unwrap();
        let path = |url: &str| Url::parse(&Builder::absolute(url).unwrap()).unwrap();
        for url in ["SQLite:jobs%20x.db?ttl=3s", "sqlite:./jobs%20x.db?ttl=3s"] {
            let Url { scheme, rest, options, .. } = path(url);
            assert_eq!((&*scheme, options.len()), ("sqlite", 1));
            assert_eq!(
                std::path::Path::new(&rest).components().collect::<std::path::PathBuf>(),
                here.join("jobs x.db")
            );
        }
        for url in ["sqlite:/a.db?ttl=3s", "sqlite:///a.db", "memory:", "memory:jobs", "etcd://h/p"] {
            assert_eq!(Builder::absolute(url).unwrap(), url);
        }
        assert!(Builder::absolute("jobs.db").is_err());
    }

    #[test]
    fn the_url_may_come_from_a_variable() {
        let variables = [("LEASE_URL", "memory:a%20b?ttl=3s")];
        let (config, url) = configure(&Builder::default(), &variables).unwrap();
        assert_eq!((config.ttl, url.unwrap().rest), (Duration::from_secs(3), "a b".into()));
    }

    #[test]
    fn wrong_settings_are_refused_with_a_word_of_help() {
        for (url, says) in [
            ("jobs.db", "no scheme"),
            ("memory:?tll=3s", "did you mean \"ttl\""),
            ("memory:?ttl", "no value"),
            ("memory:?ttl=3s&ttl=4s", "twice"),
            ("memory:?ttl=15", "number and a unit"),
            ("memory:?ttl=-3s", "number and a unit"),
            ("memory:?request_timeout=0s", "request_timeout is 0"),
            ("memory:%ff", "UTF-8"),
            ("memory:%zz", "write %25"),
            ("sqlite:j.db&ttl=3s", "options follow a '?'"),
            ("sqlite:j.db#x", "write %23"),
        ] {
            let error = configure(&Builder::default().url(url), &[]).map(drop).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{url}");
            assert!(error.to_string().contains(says), "{url}: {error}");
        }
        for (variable, meant) in [("LEASE_TLL", "LEASE_TTL"), ("LEASE_ttl", "LEASE_TTL"), ("LEASE_URI", "LEASE_URL")] {
            let error = configure(&Builder::default(), &[(variable, "3s")]).map(drop).unwrap_err().to_string();
            assert!(error.contains(variable) && error.contains(&format!("did you mean {meant:?}")), "{error}");
        }
        let error = configure(&Builder::default().url("memory:?colour=red"), &[]).map(drop).unwrap_err().to_string();
        assert!(!error.contains("did you mean"), "nothing is near: {error}");
    }
}
