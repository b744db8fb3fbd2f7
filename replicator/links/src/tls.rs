//! TLS 1.3 between two nodes that know each other by fingerprint, both ways.
//!
//! There is no authority and no expiry: a peer is whoever proves to hold the key of the pinned
//! certificate. The handshake signature is verified as usual; only the chain check is replaced
//! by the pin. Sessions are never resumed, so every connection proves the key anew.

use crate::identity::{Fingerprint, Identity};
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::NoServerSessionStorage;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, ServerConfig,
    SignatureScheme,
};
use std::sync::Arc;

/// Protocol name (ALPN) of the data plane. A control plane uses another, so that one can never
/// be taken for the other.
pub const ALPN_DATA: &[u8] = b"havm-data/1";

/// Whose certificate is accepted.
#[derive(Debug, Clone)]
pub enum Trust {
    /// One of these, and nobody else.
    Pinned(Vec<Fingerprint>),
    /// Anyone that proves to hold its own key. Only for the pairing command, which then compares
    /// [`peer_fingerprint`] with what the operator confirmed before it believes anything.
    AnyoneWhilePairing,
}

/// TLS could not be set up on this node.
#[derive(Debug, thiserror::Error)]
#[error("cannot set up TLS with this node's identity: {0}; is the identity file intact?")]
pub struct TlsSetupError(#[from] Error);

/// The certificate of the other end is not the pinned one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the other end is a stranger: its certificate's fingerprint is {found}, expected {expected}; if that machine was replaced, pair again"
)]
pub struct Stranger {
    /// What it showed.
    pub found: Fingerprint,
    /// What is pinned, as text.
    pub expected: String,
}

/// For the side that connects. `alpn` names the protocol spoken inside, see [`ALPN_DATA`].
pub fn client_config(
    identity: &Identity,
    trust: &Trust,
    alpn: &[u8],
) -> Result<Arc<ClientConfig>, TlsSetupError> {
    let provider = provider();
    let verifier = Arc::new(PinVerifier::new(trust, &provider));
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_auth_cert(vec![identity.cert().clone()], identity.key())?;
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok(Arc::new(config))
}

/// For the side that listens. Clients without a trusted certificate are refused.
pub fn server_config(
    identity: &Identity,
    trust: &Trust,
    alpn: &[u8],
) -> Result<Arc<ServerConfig>, TlsSetupError> {
    let provider = provider();
    let verifier = Arc::new(PinVerifier::new(trust, &provider));
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![identity.cert().clone()], identity.key())?;
    config.alpn_protocols = vec![alpn.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// The name to give to `ClientConnection::new`; it is neither sent nor checked.
pub fn server_name() -> ServerName<'static> {
    ServerName::IpAddress(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST).into())
}

/// Who the other end is, once the handshake is done: of `conn.peer_certificates()`.
pub fn peer_fingerprint(certificates: Option<&[CertificateDer<'_>]>) -> Option<Fingerprint> {
    certificates.and_then(<[_]>::first).map(Fingerprint::of)
}

/// A TLS error as a person should read it.
pub fn explain(error: &Error) -> String {
    use rustls::AlertDescription::{BadCertificate, CertificateUnknown, NoApplicationProtocol};
    match error {
        Error::InvalidCertificate(CertificateError::Other(other)) => other
            .0
            .downcast_ref::<Stranger>()
            .map_or_else(|| error.to_string(), ToString::to_string),
        Error::InvalidCertificate(CertificateError::BadSignature) => {
            "the other end showed a certificate whose key it does not hold".into()
        }
        Error::AlertReceived(CertificateUnknown | BadCertificate) => {
            "the other end does not know this node's certificate; pair the two again".into()
        }
        Error::AlertReceived(NoApplicationProtocol) | Error::NoApplicationProtocol => {
            "the other end speaks another protocol or version on this port".into()
        }
        Error::InvalidMessage(_) => format!("the other end does not speak TLS here ({error})"),
        other => other.to_string(),
    }
}

/// The same for an IO error that may carry a TLS error.
pub fn explain_io(error: &std::io::Error) -> String {
    match error.get_ref().and_then(|e| e.downcast_ref::<Error>()) {
        Some(tls) => explain(tls),
        None => error.to_string(),
    }
}

fn provider() -> Arc<CryptoProvider> {
    let mut provider = ring::default_provider();
    // AES-128 first: a quarter faster than AES-256 on the hot path, and as far out of reach.
    provider.cipher_suites = vec![
        ring::cipher_suite::TLS13_AES_128_GCM_SHA256,
        ring::cipher_suite::TLS13_AES_256_GCM_SHA384,
        ring::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    Arc::new(provider)
}

#[derive(Debug)]
struct PinVerifier {
    trust: Trust,
    algorithms: WebPkiSupportedAlgorithms,
}

impl PinVerifier {
    fn new(trust: &Trust, provider: &CryptoProvider) -> Self {
        PinVerifier {
            trust: trust.clone(),
            algorithms: provider.signature_verification_algorithms,
        }
    }

    fn check(&self, cert: &CertificateDer<'_>) -> Result<(), Error> {
        let found = Fingerprint::of(cert);
        match &self.trust {
            Trust::AnyoneWhilePairing => Ok(()),
            Trust::Pinned(pins) if pins.contains(&found) => Ok(()),
            Trust::Pinned(pins) => {
                let expected: Vec<String> = pins.iter().map(ToString::to_string).collect();
                let expected = match expected.len() {
                    0 => "none at all (no peer is paired)".to_owned(),
                    _ => expected.join(" or "),
                };
                let stranger = Arc::new(Stranger { found, expected });
                Err(CertificateError::Other(rustls::OtherError(stranger)).into())
            }
        }
    }

    fn refuse_tls12() -> Error {
        Error::General("TLS 1.2 is not spoken here".into())
    }
}

impl ServerCertVerifier for PinVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(end_entity)
            .map(|()| ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Self::refuse_tls12())
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for PinVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }
    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(end_entity)
            .map(|()| ClientCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Self::refuse_tls12())
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::{ClientConnection, ServerConnection};

    /// Runs a handshake in memory; the first error of either side.
    fn handshake(
        client: Arc<ClientConfig>,
        server: Arc<ServerConfig>,
    ) -> Result<(ClientConnection, ServerConnection), Error> {
        let mut c = ClientConnection::new(client, server_name()).unwrap();
        let mut s = ServerConnection::new(server).unwrap();
        while c.is_handshaking() || s.is_handshaking() {
            let mut wire = Vec::new();
            c.write_tls(&mut wire).unwrap();
            let mut bytes = wire.as_slice();
            while !bytes.is_empty() {
                s.read_tls(&mut bytes).unwrap();
                s.process_new_packets()?;
            }
            let mut wire = Vec::new();
            s.write_tls(&mut wire).unwrap();
            let mut bytes = wire.as_slice();
            while !bytes.is_empty() {
                c.read_tls(&mut bytes).unwrap();
                c.process_new_packets()?;
            }
        }
        Ok((c, s))
    }

    fn pin(id: &Identity) -> Trust {
        Trust::Pinned(vec![id.fingerprint()])
    }

    #[test]
    fn peers_that_pinned_each_other_meet_and_know_whom_they_met() {
        let (a, b) = (Identity::generate().unwrap(), Identity::generate().unwrap());
        let client = client_config(&a, &pin(&b), ALPN_DATA).unwrap();
        let server = server_config(&b, &pin(&a), ALPN_DATA).unwrap();
        let (c, s) = handshake(client, server).unwrap();
        assert_eq!(
            peer_fingerprint(c.peer_certificates()),
            Some(b.fingerprint())
        );
        assert_eq!(
            peer_fingerprint(s.peer_certificates()),
            Some(a.fingerprint())
        );
    }

    #[test]
    fn a_stranger_is_refused_on_either_side_and_named() {
        let (a, b, x) = (
            Identity::generate().unwrap(),
            Identity::generate().unwrap(),
            Identity::generate().unwrap(),
        );
        let client = client_config(&x, &pin(&b), ALPN_DATA).unwrap();
        let server = server_config(&b, &pin(&a), ALPN_DATA).unwrap();
        let refused = explain(&handshake(client, server).map(drop).unwrap_err());
        assert!(refused.contains(&x.fingerprint().to_string()), "{refused}");
        assert!(refused.contains(&a.fingerprint().to_string()), "{refused}");
        let client = client_config(&a, &pin(&b), ALPN_DATA).unwrap();
        let server = server_config(&x, &pin(&a), ALPN_DATA).unwrap();
        let refused = explain(&handshake(client, server).map(drop).unwrap_err());
        assert!(refused.contains("stranger"), "{refused}");
    }

    #[test]
    fn someone_who_shows_the_certificate_without_its_key_is_refused() {
        let (a, b, x) = (
            Identity::generate().unwrap(),
            Identity::generate().unwrap(),
            Identity::generate().unwrap(),
        );
        let provider = provider();
        let key = provider.key_provider.load_private_key(x.key()).unwrap();
        let forged = rustls::sign::CertifiedKey::new(vec![a.cert().clone()], key);
        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(PinVerifier::new(&pin(&b), &provider)))
            .with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(forged)));
        client.alpn_protocols = vec![ALPN_DATA.to_vec()];
        let server = server_config(&b, &pin(&a), ALPN_DATA).unwrap();
        let refused = handshake(Arc::new(client), server).map(drop).unwrap_err();
        assert!(
            matches!(
                refused,
                Error::InvalidCertificate(CertificateError::BadSignature)
            ),
            "{refused}"
        );
    }

    /// AES-GCM keys are good for 2^24 records; a stream of a few hours has more.
    #[test]
    #[ignore = "takes some 20 s in the dev profile: run it when rustls changes"]
    fn a_connection_outlives_its_keys() {
        let (a, b) = (Identity::generate().unwrap(), Identity::generate().unwrap());
        let client = client_config(&a, &pin(&b), ALPN_DATA).unwrap();
        let server = server_config(&b, &pin(&a), ALPN_DATA).unwrap();
        let (mut c, mut s) = handshake(client, server).unwrap();
        let (mut wire, mut got) = (Vec::new(), 0u64);
        for i in 0..(1u64 << 24) + 1000 {
            std::io::Write::write_all(&mut c.writer(), &[i as u8]).unwrap();
            c.write_tls(&mut wire).unwrap();
            s.read_tls(&mut wire.as_slice()).unwrap();
            s.process_new_packets().unwrap();
            wire.clear();
            let mut byte = [0];
            std::io::Read::read_exact(&mut s.reader(), &mut byte).unwrap();
            assert_eq!(byte[0], i as u8);
            got += 1;
            if s.wants_write() {
                s.write_tls(&mut wire).unwrap();
                c.read_tls(&mut wire.as_slice()).unwrap();
                c.process_new_packets().unwrap();
                wire.clear();
            }
        }
        assert!(got > 1 << 24);
    }

    #[test]
    fn another_protocol_is_refused() {
        let (a, b) = (Identity::generate().unwrap(), Identity::generate().unwrap());
        let client = client_config(&a, &pin(&b), b"havm-control/1").unwrap();
        let server = server_config(&b, &pin(&a), ALPN_DATA).unwrap();
        assert!(handshake(client, server).is_err());
    }
}
